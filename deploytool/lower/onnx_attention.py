"""How scaled dot product attention is written in ONNX, in place of torch's own translation.

torch scales the queries and the keys, and guards against NaN over the whole [batch, heads, queries, keys] matrix. Here
the queries alone are scaled, the mask is finite, and queries that may see no key, whose result is zero by torch's
rule, are zeroed afterwards in the smaller output. Grouped keys (`enable_gqa`), which torch refuses, are repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.onnx
from torch.onnx import symbolic_helper
from torch.onnx.symbolic_opset14 import scaled_dot_product_attention

_NAME = "aten::scaled_dot_product_attention"


@contextmanager
def own_attention(opset: int) -> Iterator[None]:
    """Inside the block, torch's exporter uses the translation of this file."""
    torch.onnx.register_custom_op_symbolic(_NAME, _attention, opset)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(_NAME, opset)  # type: ignore[attr-defined]


@symbolic_helper.parse_args("v", "v", "v", "v", "f", "b", "v", "b")
def _attention(
    g: Any, query: Any, key: Any, value: Any, mask: Any, dropout: float, causal: bool, scale: Any, grouped: bool = False
) -> Any:
    """softmax(query @ key^T * scale + mask) @ value; tensors [..., length, size], as in torch's documentation."""
    if grouped:
        key, value = (_repeated(g, tensor, query) for tensor in (key, value))
    factor = _factor(query, scale)
    rank, dtype = key.type().dim(), query.type().dtype()
    if causal or dropout or factor is None or rank is None or dtype is None:
        return scaled_dot_product_attention(g, query, key, value, mask, dropout, causal, scale, False)
    scaled = g.op("Mul", query, _number(g, factor, query))
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = g.op("MatMul", scaled, g.op("Transpose", key, perm_i=order))
    visible = None
    if not _is_none(mask):
        if mask.type().dtype() == torch.bool:
            visible = _any(g, mask, query)
            mask = g.op("Where", mask, _number(g, 0.0, query), _number(g, torch.finfo(dtype).min, query))
        scores = g.op("Add", scores, mask)
    mixed = g.op("MatMul", g.op("Softmax", scores, axis_i=-1), value)
    return mixed if visible is None else g.op("Mul", mixed, visible)


def _is_none(value: Any) -> bool:
    return value is None or value.node().mustBeNone()


def _factor(query: Any, scale: Any) -> float | None:
    """The scale as a number; None where it is only known at run time."""
    if not _is_none(scale):
        node = scale.node()
        return float(node.t("value")) if node.kind() == "onnx::Constant" else None
    size = _sizes(query)[-1]
    return None if size is None else 1.0 / math.sqrt(size)


def _sizes(tensor: Any) -> list[int | None]:
    """The sizes that are fixed; None for each that is not."""
    return tensor.type().varyingSizes() or [None] * 4


def _number(g: Any, value: float, like: Any) -> Any:
    return g.op("Constant", value_t=torch.tensor(value, dtype=like.type().dtype()))


def _any(g: Any, mask: Any, query: Any) -> Any:
    """1 where a query sees a key, else 0: [..., queries, 1]."""
    numbers = g.op("Cast", mask, to_i=_ONNX_TYPE[query.type().dtype()])
    axes = g.op("Constant", value_t=torch.tensor([-1]))
    return g.op("ReduceMax", numbers, axes, keepdims_i=1)


_ONNX_TYPE = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16}


def _repeated(g: Any, tensor: Any, query: Any) -> Any:
    """[batch, groups, length, size] -> [batch, heads, length, size]: each group's keys for all of its heads."""
    heads, (groups, size) = _sizes(query)[1], _sizes(tensor)[1::2]
    if heads is None or groups is None or size is None:
        raise ValueError("grouped attention needs the number of heads to be fixed")
    if heads == groups:
        return tensor
    one = g.op("Unsqueeze", tensor, g.op("Constant", value_t=torch.tensor([2])))
    many = g.op("Expand", one, g.op("Constant", value_t=torch.tensor([1, 1, heads // groups, 1, 1])))
    return g.op("Reshape", many, g.op("Constant", value_t=torch.tensor([0, heads, -1, size])))

"""Attention over a cache as one operator of OpenVINO, for its engine to append to the cache in place.

softmax(Q K^T * scale + mask) V becomes ScaledDotProductAttention; heads that share keys and values are repeated by
sizes that are known, not computed.
https://docs.openvino.ai/2026/documentation/openvino-ir-format/operation-sets/operation-specs/sequence/scaled-dot-product-attention.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset13 as op

_RANK = 4  # rows, heads, tokens, width


@dataclass(frozen=True)
class _Cached:
    """Keys or values [rows, heads, tokens, width] with the new ones appended, and how often each head is repeated."""

    value: Any
    repeats: int


@dataclass(frozen=True)
class _Attention:
    """The ports of one attention; `out` is its last product."""

    queries: Any
    keys: _Cached
    values: _Cached
    mask: Any
    scale: float
    out: Any


def fuse_attention(model: ov.Model, past: Sequence[str]) -> int:
    """Rewrite the attention of every layer in place, or of none where one of them is not known; returns how many."""
    ends = [node for node in model.get_ordered_ops() if node.get_type_name() == "Softmax"]
    found = [attention for node in ends if (attention := _attention(node)) is not None]
    read = [name for one in found for cached in (one.keys, one.values) for name in _past_of(cached.value)]
    if sorted(read) != sorted(past):
        return 0
    for one in found:
        fused = op.scaled_dot_product_attention(
            one.queries, _repeated(one.keys), _repeated(one.values), one.mask,
            op.constant(np.array(one.scale, one.queries.get_element_type().to_dtype())),
        )  # fmt: skip
        names = one.out.output(0).get_names()
        fused.set_friendly_name(one.out.get_friendly_name())
        one.out.output(0).replace(fused.output(0))
        fused.output(0).set_names(names)
    model.validate_nodes_and_infer_types()
    return len(found)


def _attention(softmax: Any) -> _Attention | None:
    added = softmax.input_value(0).get_node()
    if softmax.get_attributes()["axis"] not in (-1, _RANK - 1) or added.get_type_name() != "Add":
        return None
    for side in (0, 1):
        scores, scale = _scaled(added.input_value(side).get_node())
        out = _only_reader(softmax)
        if scores.get_type_name() != "MatMul" or out is None or out.get_type_name() != "MatMul":
            continue
        keys, values = _cached(_untransposed(scores)), _cached(out.input_value(1))
        plain = not any(out.get_attributes()[f"transpose_{which}"] for which in "ab")
        first = out.input_value(0).get_node().get_friendly_name() == softmax.get_friendly_name()
        alone = all(_only_reader(node) is not None for node in (added, scores))
        if keys and values and keys.repeats == values.repeats and plain and first and alone:
            return _Attention(scores.input_value(0), keys, values, added.input_value(1 - side), scale, out)
    return None


def _scaled(node: Any) -> tuple[Any, float]:
    """What is multiplied or divided by one constant number, and by what; other nodes are multiplied by 1."""
    kind = node.get_type_name()
    if kind in ("Multiply", "Divide") and _only_reader(node) is not None:
        factor = node.input_value(1).get_node()
        if factor.get_type_name() == "Constant" and factor.get_data().size == 1:
            number = float(factor.get_data().item())
            return node.input_value(0).get_node(), number if kind == "Multiply" else 1 / number
    return node, 1.0


def _untransposed(scores: Any) -> Any:
    """The keys of a product with them transposed; None for another product."""
    flags, keys = scores.get_attributes(), scores.input_value(1)
    if flags["transpose_a"]:
        return None
    if flags["transpose_b"]:
        return keys
    turn = keys.get_node()
    if turn.get_type_name() != "Transpose" or turn.input_value(1).get_node().get_type_name() != "Constant":
        return None
    return turn.input_value(0) if list(turn.input_value(1).get_node().get_data()) == [0, 1, 3, 2] else None


def _cached(value: Any) -> _Cached | None:
    """The cache that `value` is, or that it repeats head by head."""
    if value is None:
        return None
    node, repeats = value.get_node(), 1
    if node.get_type_name() == "Reshape" and node.input_value(0).get_node().get_type_name() == "Broadcast":
        spread = node.input_value(0).get_node()
        extended = spread.input_value(0).get_node()
        sizes = spread.get_output_partial_shape(0)
        if extended.get_type_name() != "Unsqueeze" or len(sizes) != _RANK + 1 or sizes[2].is_dynamic:
            return None
        value, repeats = extended.input_value(0), sizes[2].get_length()
        heads = value.get_partial_shape()[1]
        if extended.get_output_partial_shape(0)[2] != 1 or heads.is_dynamic or sizes[1] != heads:
            return None
    shape = value.get_partial_shape()
    known = len(shape) == _RANK and shape[1].is_static and shape[3].is_static
    return _Cached(value, repeats) if known and len(_past_of(value)) == 1 else None


def _past_of(value: Any) -> list[str]:
    """The input that new keys or values are appended to, as a list of one; empty where nothing is."""
    node = value.get_node()
    if node.get_type_name() != "Concat" or len(node.input_values()) != 2:
        return []
    before = node.input_value(0)
    return [before.get_any_name()] if before.get_node().get_type_name() == "Parameter" else []


def _repeated(cached: _Cached) -> Any:
    if cached.repeats == 1:
        return cached.value
    shape = cached.value.get_partial_shape()
    heads, width = shape[1].get_length() * cached.repeats, shape[3].get_length()
    sizes = op.constant(np.array([1, 1, cached.repeats, 1, 1]))
    spread = op.broadcast(op.unsqueeze(cached.value, op.constant(np.int64(2))), sizes, broadcast_spec="BIDIRECTIONAL")
    return op.reshape(spread, op.constant(np.array([0, heads, -1, width])), True).output(0)


def _only_reader(node: Any) -> Any:
    targets = list(node.output(0).get_target_inputs())
    return targets[0].get_node() if len(targets) == 1 else None

"""Root mean square norms as one node, joined with the residual sum in front of them.

Operators: SimplifiedLayerNormalization and com.microsoft.SkipSimplifiedLayerNormalization,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from deploytool.backends.onnx_edit import before, is_weight, made_by, scalar, with_scalar

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class _Norm:
    """x / sqrt(mean(x^2) + epsilon) * scale over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    x: ir.Value
    scale: ir.Value
    epsilon: float
    end: ir.Node


def fuse_norms(graph: ir.Graph) -> int:
    """Replace, in place, every root mean square norm; returns how many there were."""
    norms = [norm for node in list(graph) if node.op_type == "Mul" and (norm := _match(node))]
    for norm in norms:
        _replace(graph, norm)
    return len(norms)


def _match(end: ir.Node) -> _Norm | None:
    for weight, other in (end.inputs, end.inputs[::-1]):
        product = made_by(other, "Mul")
        if product is None or weight is None or not is_weight(weight, rank=1):
            continue
        for x, inverse in (product.inputs, product.inputs[::-1]):
            epsilon = _epsilon(x, inverse)
            if x is not None and epsilon is not None:
                return _Norm(x, weight, epsilon, end)
    return None


def _epsilon(x: ir.Value | None, inverse: ir.Value | None) -> float | None:
    """The epsilon when `inverse` is 1 / sqrt(mean(x^2) + epsilon)."""
    divided = made_by(inverse, "Div")
    root = before(divided, 1, "Sqrt") if divided and scalar(divided.inputs[0]) == 1 else None
    total = with_scalar(before(root, 0, "Add"))
    mean = made_by(total[0], "ReduceMean") if total else None
    square = before(mean, 0, "Pow")
    if total is None or square is None or square.inputs[0] is not x or scalar(square.inputs[1]) != 2:
        return None
    return total[1] if mean is not None and scalar(mean.inputs[1]) == -1 else None


def _replace(graph: ir.Graph, norm: _Norm) -> None:
    result, attributes = norm.end.outputs[0], {"epsilon": norm.epsilon}
    total = made_by(norm.x, "Add")
    if total is None or norm.x.is_graph_output() or any(v is None or v.const_value is not None for v in total.inputs):
        node = ir.node(
            "SimplifiedLayerNormalization", [norm.x, norm.scale], {**attributes, "axis": -1, "stash_type": 1}
        )
        graph.insert_before(norm.end, node)
    else:
        node = ir.node("SkipSimplifiedLayerNormalization", [*total.inputs, norm.scale], attributes, domain=MICROSOFT,
                       num_outputs=4)  # fmt: skip
        graph.insert_before(total, node)
        norm.x.replace_all_uses_with(node.outputs[3])
    result.replace_all_uses_with(node.outputs[0], replace_graph_outputs=True)

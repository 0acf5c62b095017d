"""Arithmetic on shapes vanishes where it may, and only there."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploytool.lower.onnx_shapes import simplify_shapes


class Reshaping(nn.Module):
    """Dimensions kept, merged, moved, halved, expanded and measured."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        batch, length, width = x.shape
        heads = x.view(batch, length, 4, width // 4).transpose(1, 2)
        merged = heads.transpose(1, 2).reshape(batch, length, width)
        flat = x.reshape(batch * length, width)
        moved = x.reshape(length, batch, width)
        halves = torch.cat([x[..., width // 2 :], -x[..., : width // 2]], dim=-1)
        wide = y[:, None].expand(batch, 3, y.shape[1]).reshape(batch, 3 * y.shape[1])
        return heads, merged, flat, moved, halves, wide, x.new_full((length,), 2.0)


def test_reshapes_are_right_at_every_size(make_source: Any, check: Any) -> None:
    """Kept dimensions cost nothing, moved ones are still measured, and an empty dimension is no special case."""
    samples = [(torch.randn(b, s, 8), torch.randn(b, t)) for b, s, t in ((2, 3, 5), (3, 2, 4), (1, 1, 1), (2, 4, 0))]
    outputs = {"heads": ("b", 4, "s", 2), "merged": ("b", "s", 8), "flat": ("n", 8), "moved": ("s", "b", 8),
               "halves": ("b", "s", 8), "wide": ("b", "m"), "full": ("s",)}  # fmt: skip
    source = make_source(Reshaping(), {"x": ("b", "s", 8), "y": ("b", "t")}, outputs, samples)
    graph = onnx.load(check(source).main_file).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    shapes = {node.output[0]: constants.get(node.input[1]) for node in graph.node if node.op_type == "Reshape"}
    assert shapes["merged"] == [0, 0, 8]
    assert shapes["moved"] is None
    assert [0, 0, 4, 2] in shapes.values()


def graph_of(text: str) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model('<ir_version: 9, opset_import: ["" : 18]>\n' + text))


def test_unknown_sizes_stay_computed() -> None:
    """A dimension whose equality is not known is never replaced by a copy."""
    model = graph_of("""
        g (float[a, b] x, float[c] y) => (float[m, n] z) {
            sizes = Shape(x)  other = Shape(y)
            one = Constant<value = int64[1] {1}>()
            last = Gather(sizes, one)
            shape = Concat<axis = 0>(other, last)
            z = Reshape(x, shape)
        }""")
    before = [node.op_type for node in model.graph]
    simplify_shapes(model)
    assert [node.op_type for node in model.graph] == before
    reshape = next(node for node in model.graph if node.op_type == "Reshape")
    assert reshape.inputs[1] is not None
    assert reshape.inputs[1].const_value is None

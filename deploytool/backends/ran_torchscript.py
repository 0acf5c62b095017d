"""What a TorchScript file runs: the operators of its frozen graph, as torch's profiler sees them called.

What the optimizer merges after loading (convolutions in a layout of oneDNN's) is not shown by the profiler, and counts
here as the operators that it was made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from deploytool.artifact import Artifact
from deploytool.backends.eager import ModuleRunner
from deploytool.backends.ran import Node, Shape, attention, convolution, product
from deploytool.backends.torchscript import open_script
from deploytool.signature import Feeds

_LEARNING_RUNS = 3  # the executor's, in which it compiles; they call thousands of operators
_PACKED = ("quantized::linear", "quantized::conv2d")
_CONVOLUTIONS = ("aten::conv", "aten::_convolution")
_OWN = ("aten::", "quantized::")
_VIEWS = frozenset({"as_strided", "contiguous", "detach", "expand", "expand_as", "permute", "reshape", "resolve_conj",
                    "resolve_neg", "select", "slice", "squeeze", "size", "t", "transpose", "unbind", "unflatten",
                    "unsqueeze", "view", "alias", "to", "chunk", "split", "narrow", "lift_fresh"})  # fmt: skip


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """The outermost operators that were called for `feeds`, views left out."""
    frozen = replace(artifact, settings={**artifact.settings, "optimize": False})
    with open_script(frozen) as runner:
        if not isinstance(runner, ModuleRunner):
            raise TypeError(f"{type(runner).__name__} is no module")
        for _ in range(_LEARNING_RUNS):
            runner.run(feeds)
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            runner.run(feeds)
        events: Any = seen.events()
        packed, filters = _layers(runner.module, _PACKED), _layers(runner.module, _CONVOLUTIONS)
    called = sorted((event for event in events if _is_outermost(event)), key=lambda event: event.time_range.start)
    return "torch's profiler", [_node(event, packed, filters) for event in called]


def _is_outermost(event: Any) -> bool:
    if not _is_own(event) or str(event.name).rpartition("::")[2] in _VIEWS:
        return False
    parent = event.cpu_parent
    while parent is not None and not _is_own(parent):
        parent = parent.cpu_parent
    return parent is None


def _is_own(event: Any) -> bool:
    return str(event.name).startswith(_OWN)


def _node(event: Any, packed: Iterator[Any], filters: Iterator[Any]) -> Node:
    name, op = str(event.name), str(event.name).rpartition("::")[2]
    shapes = [list(shape) for shape in event.input_shapes if shape]
    if name.startswith("quantized::"):
        return Node(op, "int8", _quantized(op, shapes, packed), "relu" in op)
    return Node(op, "fp32", _convolved(shapes, filters) if name.startswith(_CONVOLUTIONS) else _flops(op, shapes))


def _convolved(shapes: Sequence[Shape], filters: Iterator[Any]) -> int | None:
    """A convolution's own numbers are constants of its node: weight, bias, stride, padding, dilation, transposed."""
    node = next(filters, None)
    if node is None:
        return None
    weight, _, *numbers = [_constant(value) for value in list(node.inputs())[1:]]
    if weight is None or list(weight.shape) not in shapes:
        return None
    data = shapes[len(shapes) - 2 - shapes[::-1].index(list(weight.shape))]  # it comes before the weight
    if "transpose" in node.kind() or (node.kind() == "aten::_convolution" and numbers[3]):
        return convolution(data, weight.shape[1:])
    if not all(isinstance(number, list) for number in numbers[:3]):
        return None
    return _convolution(data, weight.shape, *numbers[:3])


def _constant(value: Any) -> Any:
    """What a value of a graph is; None where that is only known when it runs."""
    made = value.node()
    return [_constant(part) for part in made.inputs()] if made.kind() == "prim::ListConstruct" else value.toIValue()


def _convolution(data: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> int:
    sizes = [(size + 2 * padding[axis] - dilation[axis] * (kernel[2 + axis] - 1) - 1) // stride[axis] + 1
             for axis, size in enumerate(data[2:])]  # fmt: skip
    return convolution([data[0], kernel[0], *sizes], kernel[1:])


def _quantized(op: str, shapes: Sequence[Shape], packed: Iterator[Any]) -> int | None:
    """Linear layers and convolutions; their packed weights are told by the graph, in the order of the calls."""
    if not op.startswith(("linear", "conv2d")):
        return None if op.startswith("conv") or "lstm" in op or "gru" in op else 0
    node = next(packed, None)
    # One that rounds its input itself has that one's scale and zero point before its weight.
    weight = None if node is None else list(node.inputs())[3 if "q_dq" in op else 1].toIValue()
    if weight is None or not shapes:
        return None
    if op.startswith("linear"):
        rows = torch.ops.quantized.linear_unpack(weight)[0].shape[0]
        return product(shapes[-1], [*shapes[-1][:-1], rows])
    kernel = torch.ops.quantized.conv2d_unpack(weight)[0].shape
    numbers = (getattr(torch.ops.quantized, f"conv2d_{part}")(weight) for part in ("stride", "padding", "dilation"))
    return _convolution(shapes[-1], kernel, *numbers)


def _layers(module: Any, kinds: tuple[str, ...]) -> Iterator[Any]:
    """Nodes of a frozen graph in the order of their calls; none where it branches: they might be the wrong ones."""
    nodes = list(module.inlined_graph.nodes())
    if any(node.kind() in ("prim::If", "prim::Loop") for node in nodes):
        return iter(())
    return iter([node for node in nodes if node.kind().startswith(kinds)])


def _flops(op: str, shapes: Sequence[Shape]) -> int | None:
    """Of the last shapes: the profiler also lists what lay on the interpreter's stack before them."""
    if op in ("linear", "mkldnn_linear"):
        shapes = shapes[:-1] if len(shapes) > 2 and len(shapes[-1]) == 1 else shapes  # without the bias
        return product(shapes[-2], [*shapes[-2][:-1], shapes[-1][0]]) if len(shapes) > 1 else None
    if op in ("matmul", "mm", "bmm", "addmm", "baddbmm"):
        return product(shapes[-2], _product_shape(*shapes[-2:])) if len(shapes) > 1 else None
    if op == "scaled_dot_product_attention":
        alike = [index for index in range(len(shapes) - 2) if shapes[index + 1][:-1] == shapes[index + 2][:-1]]
        return attention(shapes[alike[-1]][:-1], shapes[alike[-1] + 1][-2], shapes[alike[-1]][-1]) if alike else None
    return None if op in ("lstm", "gru", "rnn_tanh", "einsum") else 0


def _product_shape(left: Shape, right: Shape) -> list[int]:
    return [*left[:-1], right[-1]] if len(right) > 1 else list(left[:-1])

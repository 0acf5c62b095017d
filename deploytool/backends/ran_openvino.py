"""What OpenVINO runs of an IR: the nodes of the compiled model's own runtime graph."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import openvino as ov

from deploytool.artifact import Artifact
from deploytool.backends.openvino import CompiledRunner, OpenVino
from deploytool.backends.openvino_states import without_states
from deploytool.backends.ran import Node, attention, convolution, product, recurrent
from deploytool.runner import Runner
from deploytool.signature import Feeds

_PRECISIONS = {"f32": "fp32", "f16": "fp16", "bf16": "bf16", "f64": "fp64", "u8": "int8", "i8": "int8"}
_NOT_RUN = ("Const", "Input", "Output", "Result", "Parameter")
_KERNEL_AXES = {"Convolution": 1, "GroupConvolution": 2, "ConvolutionBackpropData": 1,
                "GroupConvolutionBackpropData": 2}  # fmt: skip
_PRODUCT_LAYERS = ("FullyConnected", "MatMul", "Convolution", "Deconvolution")


def open_asked(artifact: Artifact, folder: str) -> Runner:
    """The artifact's own compiled model, which can be asked at any time; `folder` is not needed."""
    return OpenVino().open(artifact)


def read_asked(runner: Runner, artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """The nodes of the compiled model; flops are those of the layers of the IR that each says it is made of."""
    if not isinstance(runner, CompiledRunner):
        raise TypeError(f"{type(runner).__name__} is no compiled model")
    flops, products = _flops(artifact, feeds)
    graph = runner.request.get_compiled_model().get_runtime_model()
    nodes = [_node(op.get_rt_info(), flops, products) for op in graph.get_ordered_ops()]
    return "OpenVINO's runtime model", [node for node in nodes if node.op not in _NOT_RUN]


def _node(info: Any, flops: dict[str, int], products: dict[str, str]) -> Node:
    kind, made_of = _text(info, "layerType"), _text(info, "originalLayersNames")
    layers = [name for name in made_of.split(",") if name]
    precision = _PRECISIONS.get(_text(info, "runtimePrecision"), "other")
    inside = {products[name] for name in layers if name in products} if kind in _PRODUCT_LAYERS else set()
    inside |= {name for name in layers if name in flops}
    count = sum(flops[name] for name in inside)
    return Node(kind, precision, count if inside or kind not in _PRODUCT_LAYERS else None, len(layers) > 1)


def _text(info: Any, key: str) -> str:
    if key not in info:
        return ""
    found = info[key]
    return str(getattr(found, "value", found))


def _flops(artifact: Artifact, feeds: Feeds) -> tuple[dict[str, int], dict[str, str]]:
    """Flops of the IR's products by their names, at the sizes of `feeds`; and the product that an operator follows.

    A product that takes a bias in, or a scale, is known by that one's name only.
    """
    model = without_states(ov.Core().read_model(artifact.main_file))
    model.reshape({name: ov.PartialShape(list(np.shape(array))) for name, array in feeds.items()})
    found: dict[str, int] = {}
    follows: dict[str, str] = {}
    for op in model.get_ordered_ops():
        count = _count(op) if op.get_output_size() and op.output(0).get_partial_shape().is_static else None
        if count:
            name = op.get_friendly_name()
            found[name] = count
            after = [target.get_node() for target in op.output(0).get_target_inputs()]
            while len(after) == 1 and after[0].get_type_name() in ("Add", "Multiply", "Subtract"):
                follows.setdefault(after[0].get_friendly_name(), name)
                after = [target.get_node() for target in after[0].output(0).get_target_inputs()]
    return found, follows


def _count(op: Any) -> int | None:
    kind = op.get_type_name()
    shapes = [list(port.get_partial_shape().to_shape()) for port in op.inputs() if port.get_partial_shape().is_static]
    if len(shapes) < len(op.inputs()):
        return None
    out = list(op.output(0).get_shape())
    if kind == "MatMul":
        return product(shapes[0], out)
    if kind in _KERNEL_AXES:
        return convolution(shapes[0] if "Backprop" in kind else out, shapes[1][_KERNEL_AXES[kind] :])
    if kind == "ScaledDotProductAttention":
        return attention(shapes[0][:-1], shapes[1][-2], shapes[0][-1])
    if kind.endswith("Sequence") and len(shapes) > 5:  # X [batch, length, size], states, lengths, then W, R, B
        weights = [shape for shape in shapes if len(shape) == 3][-2:]
        return recurrent(math.prod(shapes[0][:2]), weights)
    return None

"""What ONNX Runtime runs of a graph: the nodes of its own optimized graph, as its profiler tells them."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnx.defs
import onnx.shape_inference
from onnx import TensorProto

from deploytool.artifact import Artifact
from deploytool.backends.engine import threads_of
from deploytool.backends.onnxruntime import BACKEND, SessionRunner, open_session
from deploytool.backends.ran import Node, Shape, attention, convolution, product, recurrent
from deploytool.signature import Feeds

_PRODUCTS = ("MatMul", "Gemm")  # parts of names: FusedMatMul, MatMulInteger, QGemm, DynamicQuantizeMatMul ...
_RECURRENT = ("LSTM", "GRU", "RNN")
_FLOATS = {"float": "fp32", "float16": "fp16", "double": "fp64", "bfloat16": "bf16"}
_INT8 = ("int8", "uint8")
_WRITTEN: Mapping[int, str]
_WRITTEN = {TensorProto.FLOAT: "fp32", TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16",
            TensorProto.DOUBLE: "fp64", TensorProto.INT8: "int8", TensorProto.UINT8: "int8",
            TensorProto.FLOAT8E4M3FN: "fp8", TensorProto.INT4: "int4"}  # fmt: skip
_STANDARD = {schema.name for schema in onnx.defs.get_all_schemas()}
_MOVES = ("Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze")
_LAYOUT = ("ReorderInput", "ReorderOutput")

Typed = tuple[str, list[int]]  # type and shape


def open_asked(artifact: Artifact, folder: str) -> SessionRunner:
    """The artifact's own session, which writes what it runs into `folder` until it was read."""
    return BACKEND.open(artifact, f"{folder}/ran")


def read_asked(runner: SessionRunner, artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """The nodes that a session of `open_asked` has run; it writes nothing down from here on."""
    ran = _written_down(runner)
    if any(node.flops is None for node in ran.values()):
        ran |= _unpacked({name for name, node in ran.items() if node.flops is None}, artifact, feeds)
    return "ONNX Runtime's profiler", list(ran.values())


def _unpacked(names: Set[str], artifact: Artifact, feeds: Feeds) -> dict[str, Node]:
    """These nodes with their flops, from a session that lays no weights out anew: the profiler does not show those."""
    plain = replace(artifact, settings={**artifact.settings, "packing": False})
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder, open_asked(plain, folder) as runner:
        runner.run(feeds)
        return {name: node for name, node in _written_down(runner).items() if name in names}


def read_graph(artifact: Artifact, feeds: Feeds, runs: str = "") -> list[Node]:
    """The nodes of a graph as it stands, nothing fused: for engines that were built from it and cannot be asked.

    Precisions are those that the graph writes down: ONNX Runtime puts casts around what its CPU has no kernel for. A
    product of two tensors that DequantizeLinear gives is written as one of whole numbers, as engines that take Q/DQ
    graphs read it: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
    `runs` names a file with the same nodes that ONNX Runtime can run, where it cannot run the graph itself.
    """
    runnable = artifact.folder / runs if runs else artifact.main_file
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        session = open_session(runnable, threads_of(artifact), "disabled", profile=f"{folder}/ran")
        with SessionRunner(session, artifact.signature) as runner:
            runner.run(feeds)
            ran = _written_down(runner)
    model = onnx.shape_inference.infer_shapes(onnx.load(artifact.main_file), strict_mode=False)
    known = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in known}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    return [replace(ran[node.name], precision=_written(node, types, makers, ran[node.name]))
            for node in model.graph.node if node.name in ran]  # fmt: skip


def _written(
    node: onnx.NodeProto, types: Mapping[str, int], makers: Mapping[str, onnx.NodeProto], ran: Node
) -> str:  # fmt: skip
    """The precision of a node's result; of a product, that of its first operand, or of the codes of its first two."""
    if ran.flops != 0 and len(node.input) > 1:
        codes = [_WRITTEN.get(types.get(_codes(name, makers), 0), "other") for name in node.input[:2]]
        if codes[0] == codes[1] and codes[0] in ("int8", "fp8"):
            return codes[0]
        if codes[1] == "int4":
            return "int4 weights"
    name = node.input[0] if ran.flops != 0 and node.input else node.output[0]
    return _WRITTEN.get(types.get(name, 0), "other")


def _codes(name: str, makers: Mapping[str, onnx.NodeProto]) -> str:
    """The tensor that DequantizeLinear made a value from, through what only lays it out anew; "" for other values."""
    while (maker := makers.get(name)) is not None and maker.op_type in _MOVES:
        name = maker.input[0]
    return maker.input[0] if maker is not None and maker.op_type == "DequantizeLinear" else ""


def _written_down(runner: SessionRunner) -> dict[str, Node]:
    """The nodes that ran, by their names."""
    events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    seen: dict[str, Node] = {}
    for event in events:
        if event.get("cat") == "Node" and "op_name" in event.get("args", {}):
            seen.setdefault(event["name"].removesuffix("_kernel_time"), _node(event["args"]))
    return seen


def _node(about: Mapping[str, Any]) -> Node:
    inputs, outputs = _typed(about["input_type_shape"]), _typed(about["output_type_shape"])
    op, place = str(about["op_name"]), str(about["provider"]).removesuffix("ExecutionProvider")
    flops = _flops(op, inputs, outputs)
    fused = op not in _STANDARD and op not in _LAYOUT
    return Node(op, _precision(op, inputs, outputs, flops), flops, fused, place)


def _typed(listed: Sequence[Mapping[str, list[int]]]) -> list[Typed]:
    return [(kind, shape) for one in listed for kind, shape in one.items()]


def _precision(op: str, inputs: Sequence[Typed], outputs: Sequence[Typed], flops: int | None) -> str:
    kinds = [kind for kind, _ in inputs]
    if "NBits" in op:
        return "low-bit weights"
    if flops != 0 and (op.startswith(("Q", "DynamicQuantize")) or any(kind in _INT8 for kind in kinds)):
        return "int8"
    made = [kind for kind, _ in outputs] or kinds
    found = next((_FLOATS[kind] for kind in made if kind in _FLOATS), None)
    if found == "fp32" and "float16" in kinds and flops != 0:
        return "fp16"
    return found or ("int8" if any(kind in _INT8 for kind in made) else "other")


def _flops(op: str, inputs: Sequence[Typed], outputs: Sequence[Typed]) -> int | None:
    """0 for no product, None for one whose weights the profiler does not show: packed ones are gone."""
    shapes = [shape for _, shape in inputs if len(shape) > 1]
    out = outputs[0][1] if outputs else []
    if any(part in op for part in _PRODUCTS):
        return product(shapes[0], out) if shapes else None
    if "Conv" in op:
        return _convolution(op, [s for s in shapes if len(s) > 2], out)
    if op.removeprefix("DynamicQuantize") in _RECURRENT:
        return recurrent(math.prod(shapes[0][:2]), shapes[1:3]) if len(shapes) > 2 else None
    if "Attention" in op:
        return _attention(op, shapes, out)
    return None if op == "Einsum" else 0


def _convolution(op: str, shapes: Sequence[Shape], out: Shape) -> int | None:
    if len(shapes) < 2:
        return None
    data, kernel = shapes[:2]
    return convolution(data if "Transpose" in op else out, kernel[1:])


def _attention(op: str, shapes: Sequence[Shape], out: Shape) -> int | None:
    """[batch, length, width] queries; Attention and QAttention project them too, from one weight [width, 3 * width]."""
    if op in ("Attention", "QAttention"):
        if len(shapes) < 2:
            return None
        return 2 * math.prod(shapes[0][:2]) * math.prod(shapes[1]) + attention(out[:2], out[1], out[-1])
    lengths = [shape[-2] for shape in shapes[1:3]]  # keys, as [batch, length, width] or [batch, heads, length, width]
    return attention(out[:2], max(lengths), out[-1]) if lengths and len(out) == 3 else None

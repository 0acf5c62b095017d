"""A graph of 16-bit tensors as one that computes in fp32 and rounds every one of them: what a CPU can stand in with.

On CPUs ONNX Runtime computes most fp16 operators in float and leaves the rounding out where two of them meet, so that
its outputs would look better than any GPU's; of bf16 it has no products at all. Here every tensor that the graph holds
in fp16 or bf16 is a float that went through that type and back: the rounding points are those of the graph that a
compiler is given, since they are read off it, tensor by tensor. What stays the engine's own is the order of its sums,
and the roundings that it leaves out where it fuses.
"""

from __future__ import annotations

from collections.abc import Mapping

from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper

from deploytool.backends.onnx_half import tensor_types

HALVES = (TensorProto.FLOAT16, TensorProto.BFLOAT16)


def in_floats(model: ModelProto) -> ModelProto:
    """A copy in fp32 with the same node names, in which every 16-bit tensor is rounded by a Cast there and back.

    Weights keep their 16 bits and are cast where they are read, so that they may lie in a file beside both graphs.
    Inputs and outputs of 16 bits become floats: outputs are rounded, inputs must be.
    """
    halves = {name: kind for name, kind in tensor_types(model).items() if kind in HALVES}
    result = ModelProto()
    result.CopyFrom(model)
    for field in ("node", "value_info"):
        result.graph.ClearField(field)
    for value in (*result.graph.input, *result.graph.output):
        if value.name in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in result.graph.initializer:
        if tensor.name in halves:
            result.graph.node.append(_cast(f"{tensor.name}:stored", tensor.name, TensorProto.FLOAT))
            tensor.name = f"{tensor.name}:stored"
    for node in model.graph.node:
        result.graph.node.extend(_rounding(node, halves))
    return result


def _rounding(node: NodeProto, halves: Mapping[str, int]) -> list[NodeProto]:
    """The node on floats, and the casts that round its outputs."""
    copy = NodeProto()
    copy.CopyFrom(node)
    stored = node.op_type in ("Cast", "Constant", "ConstantOfShape")  # gives the 16-bit type itself
    if not stored:
        _in_float(copy)
    casts = []
    for index, name in enumerate(node.output):
        if name in halves:
            copy.output[index] = f"{name}:stored" if stored else f"{name}:exact"
            casts += [] if stored else [_cast(f"{name}:exact", f"{name}:stored", halves[name])]
            casts.append(_cast(f"{name}:stored", name, TensorProto.FLOAT))
    return [copy, *casts]


def _in_float(node: NodeProto) -> None:
    """Where a node's own attributes say 16 bits, let them say float."""
    for attribute in node.attribute:
        if attribute.name == "dtype" and attribute.type == AttributeProto.INT and attribute.i in HALVES:
            attribute.i = TensorProto.FLOAT


def _cast(source: str, result: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}:rounding", to=kind)

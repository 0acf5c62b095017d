"""Rewrites a float ONNX graph to 16 bits, fp16 or bf16, but for chosen nodes; a pure graph-to-graph step.

Every float tensor has up to two forms, half and full, made by one Cast when a node first asks for the other. Inputs and
outputs of the graph keep their types. (The converters of onnxruntime 1.31 and onnxconverter-common 1.16 write graphs
that do not load when one tensor feeds two fp32 nodes.)
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.errors import InputRefused

LARGEST = 65504.0
SMALLEST = 2.0**-14  # below, half precision loses digits
_ENDS: dict[int, float] = {TensorProto.FLOAT16: LARGEST, TensorProto.BFLOAT16: (2 - 2.0**-7) * 2.0**127}
_ALWAYS_FULL_INPUTS = {"Resize": (1, 2)}  # region and scales


def to_half(model: ModelProto, fp32_nodes: Collection[str], kind: int = TensorProto.FLOAT16) -> ModelProto:
    """A copy in FLOAT16 or BFLOAT16; nodes named in `fp32_nodes`, and those with a body (If, Loop), compute in float.

    Constants beyond the type's range are clipped to its ends: they are masks.
    """
    work = _Rewriter(model, frozenset(fp32_nodes), kind)
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.value_info[:]
    del result.graph.initializer[:]
    del result.graph.node[:]
    work.rewrite(model.graph)
    result.graph.initializer.extend(work.constants.values())
    result.graph.node.extend(work.nodes)
    return result


class _Rewriter:
    """Walks the nodes in order; `half` and `full` say where a float tensor's forms are to be found."""

    def __init__(self, model: ModelProto, fp32_nodes: frozenset[str], kind: int) -> None:
        self.fp32_nodes, self.kind = fp32_nodes, kind
        self.given = {t.name: t for t in model.graph.initializer}
        self.floats = float_tensors(model)
        self.results = {value.name for value in model.graph.output}
        self.half: dict[str, str] = {}
        self.full: dict[str, str] = {v.name: v.name for v in model.graph.input if v.name in self.floats}
        self.nodes: list[NodeProto] = []
        self.constants = {name: t for name, t in self.given.items() if name not in self.floats}

    def rewrite(self, graph: GraphProto) -> None:
        for node in graph.node:
            full = node.name in self.fp32_nodes or bool(bodies(node))
            copy = NodeProto()
            copy.CopyFrom(node)
            for index, name in enumerate(node.input):
                if name in self.floats:
                    keep = full or index in _ALWAYS_FULL_INPUTS.get(node.op_type, ())
                    copy.input[index] = self._full(name) if keep else self._half(name)
            for body in bodies(copy):
                self._rename_captured(body)
            self.nodes.append(copy)
            self._place_outputs(node, copy, full)
        for name in sorted(self.results & self.floats):
            if self.full.get(name) != name:
                self.nodes.append(_cast(self._half(name), name, TensorProto.FLOAT))

    def _place_outputs(self, node: NodeProto, copy: NodeProto, full: bool) -> None:
        if not full:
            _retype(copy, self.kind)
        for index, name in enumerate(node.output):
            if name in self.floats and full:
                self.full[name] = name
            elif name in self.floats:
                self.half[name] = copy.output[index] = f"{name}:half" if name in self.results else name

    def _half(self, name: str) -> str:
        if name not in self.half:
            self.half[name] = f"{name}:half"
            if name in self.given:
                self.constants[f"{name}:half"] = _half_constant(self.given[name], f"{name}:half", self.kind)
            else:
                self.nodes.append(_cast(self.full[name], f"{name}:half", self.kind))
        return self.half[name]

    def _full(self, name: str) -> str:
        if name not in self.full:
            if name in self.given:
                self.full[name] = name
                self.constants[name] = self.given[name]
            else:
                self.full[name] = f"{name}:full"
                self.nodes.append(_cast(self.half[name], f"{name}:full", TensorProto.FLOAT))
        return self.full[name]

    def _rename_captured(self, body: GraphProto) -> None:
        """A body reads tensors of the graph around it by name: let it read their float form."""
        own = (
            {v.name for v in body.input} | {t.name for t in body.initializer} | {o for n in body.node for o in n.output}
        )
        for node in body.node:
            for index, name in enumerate(node.input):
                if name not in own and name in self.floats:
                    node.input[index] = self._full(name)
            for inner in bodies(node):
                self._rename_captured(inner)
        for value in body.output:
            if value.name not in own and value.name in self.floats:
                value.name = self._full(value.name)


def float_tensors(model: ModelProto) -> set[str]:
    """Names of the graph's float32 tensors; raises InputRefused when the type of one cannot be told."""
    return {name for name, kind in tensor_types(model).items() if kind == TensorProto.FLOAT}


def tensor_types(model: ModelProto) -> dict[str, int]:
    """Element type of every tensor; raises InputRefused when that of one cannot be told."""
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*graph.value_info, *graph.input, *graph.output)}
    types |= {t.name: t.data_type for t in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and not types.get(name):
                raise InputRefused("DT310", f"the type of every tensor must be known for 16 bits (got {node.op_type}, "
                                            f"node {node.name!r})")  # fmt: skip
    return types


def _retype(node: NodeProto, kind: int) -> None:
    """Where a node's own attributes say float, let them say the 16-bit type."""
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype") and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        if attribute.type == AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(_half_constant(attribute.t, attribute.t.name, kind))
        if node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
            number = attribute.f if attribute.name == "value_float" else list(attribute.floats)
            value = numpy_helper.from_array(_clipped(np.array(number, np.float32), kind))
            attribute.CopyFrom(helper.make_attribute("value", value))
    if node.op_type == "ConstantOfShape" and not node.attribute:
        zero = numpy_helper.from_array(_clipped(np.zeros(1, np.float32), kind))
        node.attribute.append(helper.make_attribute("value", zero))


def _half_constant(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    return numpy_helper.from_array(_clipped(numpy_helper.to_array(tensor), kind), name)


def _clipped(array: np.ndarray, kind: int) -> np.ndarray:
    half: np.ndarray = np.clip(array, -_ENDS[kind], _ENDS[kind]).astype(helper.tensor_dtype_to_np_dtype(kind))
    return half


def _cast(source: str, result: str, kind: int) -> NodeProto:
    return helper.make_node("Cast", [source], [result], name=f"{result}:cast", to=kind)


def bodies(node: NodeProto) -> list[GraphProto]:
    """The graphs inside of a node, such as the ways of an If."""
    return [graph for a in node.attribute for graph in ([a.g] if a.type == AttributeProto.GRAPH else a.graphs)]

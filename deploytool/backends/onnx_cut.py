"""Cuts ONNX graphs: those of ONNX Runtime targets, and the graph that TensorRT was given."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.cut import CutNode, Stored
from deploytool.backends.onnx_rounded import HALVES, in_floats
from deploytool.backends.onnxruntime import open_session
from deploytool.errors import BackendFailed, InputRefused
from deploytool.signature import Feeds, Outputs

GRAPH = "model.onnx"
_GIVEN = ":given"
_QUANTIZED = "_quantized"
_WRAPPERS = 2  # scopes of our own around the user's module: the weights' lender and the flat module
_SCOPES = "pkg.torch.onnx.name_scopes"


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[OnnxGraph, OnnxGraph]:
    """The portable graph without any fusion, and the artifact's; of TensorRT the graph behind the engine."""
    half = artifact.precision in ("fp16", "bf16") or "parity_graph" in artifact.settings
    level = "disabled" if half else str(artifact.settings.get("optimization", "all"))
    path = artifact.folder / str(artifact.settings.get("graph", artifact.entry))
    if path.suffix != ".onnx":
        raise InputRefused("DT313", f"an artifact can be bisected by its ONNX graph (got {path.name})",
                           fix='build it with format = "onnx" in [build]')  # fmt: skip
    return portable_graph(prepared), OnnxGraph(onnx.load(path), level, rounded=half)


def portable_graph(prepared: Path) -> OnnxGraph:
    """The model's own graph, which was shown to be right when it was made."""
    return OnnxGraph(onnx.load(prepared / "onnx" / GRAPH), "disabled")


class OnnxGraph:
    """An ONNX graph whose sub-models run in ONNX Runtime; see CutGraph."""

    def __init__(self, model: ModelProto, optimization: str, *, rounded: bool = False) -> None:
        self._model, self._level, self._rounded = model, optimization, rounded
        self._constants = {t.name: t for t in model.graph.initializer}
        self._constants |= {n.output[0]: a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute
                            if a.name == "value"}  # fmt: skip
        self._protos = [node for node in model.graph.node if node.output[0] not in self._constants]
        self._makers = {name: node for node in self._protos for name in node.output if name}
        self._types = _types(model)
        self.nodes = tuple(_cut_node(node, self._constants) for node in self._protos)
        self.outputs = tuple(value.name for value in model.graph.output)

    def constant(self, name: str) -> np.ndarray | None:
        """The value of an initializer or of a Constant node."""
        return numpy_helper.to_array(self._constants[name]) if name in self._constants else None

    def stored(self, node: CutNode) -> Stored | None:
        """The int8 weight of a product with its scale and zero point, as ONNX Runtime's quantizer names them."""
        name = node.constants.get(1, "")
        if not node.kind.endswith("Integer") or not name.endswith(_QUANTIZED):
            return None
        parts = [self.constant(f"{name.removesuffix(_QUANTIZED)}{part}") for part in ("_scale", "_zero_point")]
        codes, scale, zero = self.constant(name), *parts
        if codes is None or scale is None or zero is None:
            return None
        if node.kind == "ConvInteger" and scale.size > 1:  # output channels come first
            scale, zero = (a.reshape(-1, *(1,) * (codes.ndim - 1)) if a.size > 1 else a for a in (scale, zero))
        steps = scale.astype(np.float64)
        return Stored((codes.astype(np.float64) - zero.astype(np.float64)) * steps, steps)

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The sub-model between `given` and `wanted`; see CutGraph."""
        feeds = {f"{name}{_GIVEN}": self._fed(name, array) for name, array in given.items()}
        model = self._between(wanted, given)
        asked = {value.name for value in model.graph.input}
        try:
            session = open_session(model.SerializeToString(), 1, self._level)
            arrays = session.run(list(wanted), {name: array for name, array in feeds.items() if name in asked})
        except BackendFailed:
            raise
        except Exception as error:  # the library raises a class of its own per status, without a common base
            raise BackendFailed("DT504", f"ONNX Runtime must run the cut graph (got: {error})"[:2000]) from error
        return {name: self._as_stored(name, np.asarray(array)) for name, array in zip(wanted, arrays, strict=True)}

    def _fed(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array in the type that the session takes: of a rounding graph, floats that are 16-bit numbers."""
        typed = self._typed(name, array)
        return typed.astype(np.float32) if self._rounded and self._types.get(name) in HALVES else typed

    def _as_stored(self, name: str, array: np.ndarray) -> np.ndarray:
        """A rounded float in the 16 bits that the artifact has it in."""
        known = self._types.get(name, 0)
        return array.astype(helper.tensor_dtype_to_np_dtype(known)) if self._rounded and known in HALVES else array

    def _typed(self, name: str, array: np.ndarray) -> np.ndarray:
        """The array in the type that this graph has for it: a tensor may be half precision here."""
        known = self._types.get(name)
        if known is None:
            return array
        with np.errstate(over="ignore"):  # what half precision cannot hold is infinite, as it is in the artifact
            return np.asarray(array, dtype=helper.tensor_dtype_to_np_dtype(known), order="C")

    def _between(self, wanted: Sequence[str], given: Feeds) -> ModelProto:
        kept, used = self._reached(wanted, given)
        result = ModelProto(ir_version=self._model.ir_version, opset_import=self._model.opset_import,
                            functions=self._model.functions)  # fmt: skip
        result.graph.name = "cut"
        for node in self._protos:
            if id(node) in kept:
                copy = result.graph.node.add()
                copy.CopyFrom(node)
                _rename(copy, given)
        result.graph.input.extend(
            helper.make_tensor_value_info(f"{name}{_GIVEN}", helper.np_dtype_to_tensor_dtype(array.dtype),
                                          [None] * array.ndim)
            for name, array in ((n, self._typed(n, a)) for n, a in given.items() if n in used))  # fmt: skip
        result.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in wanted)
        for name in used:
            if name in self._constants:
                tensor = result.graph.initializer.add()
                tensor.CopyFrom(self._constants[name])
                tensor.name = name
        return in_floats(result) if self._rounded else result

    def _reached(self, wanted: Sequence[str], given: Feeds) -> tuple[set[int], set[str]]:
        """Identities of the nodes that the wanted tensors need, and the names that these nodes read."""
        kept: set[int] = set()
        used: set[str] = set()
        ahead = [self._makers[name] for name in wanted]
        while ahead:
            node = ahead.pop()
            if id(node) in kept:
                continue
            kept.add(id(node))
            names = {*node.input, *(name for body in _bodies(node) for name in _captured(body))}
            used |= names
            ahead += [self._makers[name] for name in names if name in self._makers and name not in given]
        return kept, used


def nodes_of(path: Path, kind: str) -> list[CutNode]:
    """The nodes of one kind in a file, in order; weights that lie beside it are not read."""
    graph = onnx.load(path, load_external_data=False).graph
    constants = {tensor.name for tensor in graph.initializer}
    return [_cut_node(node, constants) for node in graph.node if node.op_type == kind]


def _cut_node(node: NodeProto, constants: Container[str]) -> CutNode:
    names = [*node.input, *(name for body in _bodies(node) for name in _captured(body))]
    return CutNode(
        name=node.name or node.output[0],
        kind=node.op_type,
        inputs={i: name for i, name in enumerate(names) if name and name not in constants},
        outputs=tuple(name for name in node.output if name),
        constants={i: name for i, name in enumerate(names) if name in constants},
        module=module_of(node, (name for name in names if name in constants)),
        attributes={a.name: _plain(a) for a in node.attribute},
    )


def module_of(node: NodeProto, weights: Iterable[str]) -> str:
    """Path of the source module: the owner of its weights, else what exporters leave in its name or metadata."""
    for weight in weights:
        if "." in weight and "/" not in weight:
            return weight.removesuffix(".T").rpartition(".")[0]
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            scopes = [scope.strip(" '\"") for scope in entry.value.strip("[]").split(",")]
            return scopes[-2].removeprefix("module.") if len(scopes) > 1 else ""
    parts = node.name.split("/")
    if len(parts) <= _WRAPPERS + 1 or parts[1 : _WRAPPERS + 1] != ["module"] * _WRAPPERS:
        return ""
    path = ".".join(parts[_WRAPPERS + 1 : -1])
    return path.removeprefix("module.")  # children of a Sequential that is the model itself are named so


def _types(model: ModelProto) -> dict[str, int]:
    """Element types of the tensors, where inference finds them."""
    light = ModelProto()
    light.CopyFrom(model)
    for tensor in light.graph.initializer:
        if len(tensor.raw_data) > 1024:  # inference reads small constants, such as shapes, only
            tensor.ClearField("raw_data")
    graph = onnx.shape_inference.infer_shapes(light, check_type=False, strict_mode=False).graph
    values = (*graph.input, *graph.value_info, *graph.output)
    return {v.name: v.type.tensor_type.elem_type for v in values if v.type.tensor_type.elem_type}


def _bodies(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g


def _captured(body: GraphProto) -> set[str]:
    """Names that a body reads from around it."""
    own = {v.name for v in body.input} | {t.name for t in body.initializer}
    own |= {name for node in body.node for name in node.output}
    read = {name for node in body.node for name in node.input}
    read |= {name for node in body.node for inner in _bodies(node) for name in _captured(inner)}
    read |= {v.name for v in body.output}
    return {name for name in read - own if name}


def _rename(node: NodeProto, given: Feeds) -> None:
    """Let a node, and the bodies inside it, read the given tensors."""
    for index, name in enumerate(node.input):
        if name in given:
            node.input[index] = f"{name}{_GIVEN}"
    for body in _bodies(node):
        for inner in body.node:
            _rename(inner, given)


def _plain(attribute: AttributeProto) -> Any:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, TensorProto):
        return numpy_helper.to_array(value).tolist()
    if isinstance(value, GraphProto):
        return "(graph)"
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value if isinstance(value, int | float) else [str(v) if isinstance(v, bytes) else v for v in value]

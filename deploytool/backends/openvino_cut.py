"""Cuts OpenVINO models. Their tensors keep the names that they have in the ONNX graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.backends.cut import CutGraph, CutNode, Stored
from deploytool.backends.onnx_cut import portable_graph
from deploytool.backends.openvino import compile_ir
from deploytool.backends.openvino_states import without_states
from deploytool.errors import BackendFailed
from deploytool.signature import Feeds, Outputs

import openvino as ov  # isort: skip  # silenced by the backend's file, which must come first

# The operators of the reference, for those whose names differ.
_FEW_BITS = 8
_KINDS = {"Multiply": "Mul", "Divide": "Div", "Subtract": "Sub", "Power": "Pow", "SoftMax": "Softmax"}


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[CutGraph, CutGraph]:
    """The portable graph that the IR was made from, and the IR."""
    return portable_graph(prepared), OpenVinoGraph(artifact.main_file)


class OpenVinoGraph:
    """An IR whose sub-models are compiled for the CPU; see CutGraph."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: dict[str, str] = {}  # every name of a tensor -> the one that is used
        model = without_states(ov.Core().read_model(path))
        self._constants = {_key(op.output(0)): op for op in model.get_ops() if op.get_type_name() == "Constant"}
        plain = [op for op in model.get_ordered_ops() if op.get_type_name() not in ("Constant", "Parameter", "Result")]
        self.nodes = tuple(node for op in plain for node in self._nodes_of(op))
        self.outputs = tuple(_key(result.input_value(0)) for result in model.get_results())

    def _nodes_of(self, op: Any) -> list[CutNode]:
        """One node per name of each output: the importer merges tensors that are the same."""
        sources = [_key(value) for value in op.input_values()]
        names = [name for output in op.outputs() for name in (sorted(output.get_names()) or [_key(output)])]
        attributes = {name: _plain(value) for name, value in op.get_attributes().items()}
        return [CutNode(
            name=op.get_friendly_name(),
            kind=_kind(op),
            inputs={i: name for i, name in enumerate(sources) if name not in self._constants},
            outputs=tuple(names),
            constants={i: name for i, name in enumerate(sources) if name in self._constants},
            attributes=attributes,
        )]  # fmt: skip

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a Constant."""
        return np.array(self._constants[name].get_data()) if name in self._constants else None

    def stored(self, node: CutNode) -> Stored | None:
        """None: NNCF moves sizes between weights and activations, so that no weight is the model's alone."""
        return None

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The sub-model between `given` and `wanted`; see CutGraph."""
        model = without_states(ov.Core().read_model(self._path))
        ports = {name: output for op in model.get_ordered_ops() for output in op.outputs()
                 for name in (_key(output), *output.get_names())}  # fmt: skip
        results = _results(model, [ports[name] for name in wanted])
        parameters = {}
        for name, array in given.items():
            port = ports.get(name)
            if port is None or _key(port) in parameters:
                continue
            # Sizes stay free, but for whole numbers: those may say what rank another tensor has.
            shape = [-1] * array.ndim if array.dtype.kind == "f" else list(array.shape)
            parameter = ov.opset13.parameter(ov.PartialShape(shape), port.get_element_type())
            _redirect(port, parameter, results)
            parameters[_key(port)] = (parameter, array)
        used = [parameter for parameter, _ in parameters.values()]
        try:
            request = compile_ir(ov.Model(results, used, "cut"), 1).create_infer_request()
            arrays = [array.astype(parameter.get_element_type().to_dtype()) for parameter, array in parameters.values()]
            request.infer(dict(enumerate(arrays)))
            return {name: np.array(request.get_output_tensor(i).data) for i, name in enumerate(wanted)}
        except RuntimeError as error:
            raise BackendFailed("DT504", f"OpenVINO must run the cut graph (got: {error})"[:2000]) from error


def _results(model: Any, wanted: Sequence[Any]) -> list[Any]:
    """A result for each port: the model's own where it has one. Its others let go of what they show."""
    own = {_key(result.input_value(0)): result for result in model.get_results()}
    found = [own.pop(_key(port), None) or ov.opset13.result(port) for port in wanted]
    nothing = ov.opset13.constant(0.0)
    for result in own.values():
        result.input(0).replace_source_output(nothing.output(0))
    return found


def _kind(op: Any) -> str:
    """The reference's name of an operator; a weight that is stored in few bits is dequantized."""
    kind = str(op.get_type_name())
    if kind == "Convert" and op.input_value(0).get_node().get_type_name() == "Constant":
        stored = op.input_value(0).get_element_type()
        if stored.is_integral() and stored.get_bitwidth() <= _FEW_BITS:
            return "DequantizeConvert"
    return _KINDS.get(kind, kind)


def _redirect(port: Any, parameter: Any, results: Sequence[Any]) -> None:
    """Let every consumer but the asked-for results read the parameter."""
    own = {result.get_friendly_name() for result in results}
    for target in list(port.get_target_inputs()):
        if target.get_node().get_friendly_name() not in own:
            target.replace_source_output(parameter.output(0))


def _key(output: Any) -> str:
    """A name of its own for every tensor: its first by the alphabet, else that of its node."""
    names = sorted(output.get_names())
    return str(names[0]) if names else f"{output.get_node().get_friendly_name()}#{output.get_index()}"


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else str(value)

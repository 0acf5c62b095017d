"""Cuts TorchScript graphs, traced and frozen: those of fp32 targets and of fbgemm's int8."""

from __future__ import annotations

import difflib
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploytool.artifact import Artifact
from deploytool.backends.cut import CutNode, Stored
from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.quantized_engine import use_engine_of
from deploytool.backends.torchscript import ENTRY
from deploytool.backends.torchscript_make import quiet_jit, trace
from deploytool.cases import read_cases
from deploytool.errors import BackendFailed, InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.load.model import open_source
from deploytool.load.plain_attention import unfuse
from deploytool.signature import Feeds, Outputs, Signature
from deploytool.source import ModelRef

_CONSTANT = "prim::Constant"
# What quantizers add or leave out between operators; a graph's order of the others is the same.
_PASSING = ("prim::GetAttr", "prim::ListConstruct", "prim::TupleConstruct", "aten::to", "aten::quantize_per_tensor",
            "aten::dequantize")  # fmt: skip
_PLAIN = {"quantized::linear_dynamic": "aten::linear", "quantized::linear": "aten::linear",
          "aten::quantized_lstm": "aten::lstm", "quantized::embedding_byte": "aten::embedding",
          "quantized::conv1d": "aten::_convolution", "quantized::conv2d": "aten::_convolution",
          "quantized::conv3d": "aten::_convolution", "quantized::conv1d_relu": "aten::relu",
          "quantized::conv2d_relu": "aten::relu", "quantized::conv3d_relu": "aten::relu",
          "quantized::linear_relu": "aten::relu", "quantized::leaky_relu": "aten::leaky_relu"}  # fmt: skip
_WHOLE = "quantized::"
_OPERATORS = torch.ops.quantized
_UNPACK = {"quantized::linear": _OPERATORS.linear_unpack, "quantized::conv1d": _OPERATORS.conv1d_unpack,
           "quantized::conv2d": _OPERATORS.conv2d_unpack, "quantized::conv3d": _OPERATORS.conv3d_unpack}  # fmt: skip


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[ScriptGraph, ScriptGraph]:
    """The model traced anew in fp32, as the artifact was, and the artifact's graph."""
    if artifact.backend == "fbgemm":
        use_engine_of(artifact.settings)
    if artifact.settings.get("made_by") == "script":
        raise InputRefused("DT313", f"only a graph without branches can be bisected (got {artifact.target!r}, which "
                           "torch.jit.script compiled)", fix="choose another target")  # fmt: skip
    source = open_source(ModelRef(**ref))
    feeds = example_of(artifact, prepared)
    arguments = tuple(tensor.clone() for tensor in positional(artifact.signature, feeds))
    if artifact.settings.get("unfused"):  # into linears that the artifact has, and the trace of the model must have too
        unfuse(source.flat)
    owners = {_fingerprint(weight): name.removeprefix("module.").rpartition(".")[0]
              for name, weight in source.flat.named_parameters()}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        path = Path(folder) / ENTRY
        with quiet_jit():
            torch.jit.save(torch.jit.freeze(trace(source.flat, arguments)), str(path))
        reference = ScriptGraph(_load(path), artifact.signature, owners)
    candidate = ScriptGraph(_load(artifact.main_file), artifact.signature, {})
    given = {spec.name: tensor.numpy() for spec, tensor in zip(artifact.signature.inputs, arguments, strict=True)}
    candidate.take_names(reference, given)
    return reference, candidate


def _load(path: Path) -> Any:
    with quiet_jit(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.(ao\.quantization is deprecated|quantize_per_)")
        return torch.jit.load(str(path), map_location="cpu")


def example_of(artifact: Artifact, prepared: Path) -> Feeds:
    """The calibration feeds that the backend traced or exported with."""
    return max((case.inputs for case in read_cases(prepared / "calibration")), key=lambda f: _rank(artifact, f))


def _rank(artifact: Artifact, feeds: Feeds) -> tuple[int, int]:
    """As the backend chooses the feeds that it traces with."""
    sizes = artifact.signature.bind(feeds)
    return sum(size > 1 for size in sizes.values()), -sum(array.size for array in feeds.values())


class ScriptGraph:
    """A frozen graph whose sub-graphs run in TorchScript's interpreter; see CutGraph."""

    def __init__(self, script: Any, signature: Signature, owners: Mapping[tuple[Any, ...], str]) -> None:
        self._script, self._owners = script, owners
        graph = script.graph
        fed = list(graph.inputs())[1:]  # the first is the module itself
        self._fed = dict(zip((value.debugName() for value in fed), signature.input_names, strict=True))
        self._constants = {node.output().debugName(): node for node in graph.nodes() if node.kind() == _CONSTANT}
        returned = _returned(graph)
        self._results = dict(zip((value.debugName() for value in returned), signature.output_names, strict=True))
        self._taken: dict[str, str] = {}
        self._grids: dict[str, tuple[float, int, torch.dtype]] = {}
        self.outputs = tuple(signature.output_names)
        self.nodes = self._read()

    def _read(self) -> tuple[CutNode, ...]:
        nodes = enumerate(self._script.graph.nodes())
        return tuple(self._node(node, index) for index, node in nodes if node.kind() != _CONSTANT)

    def take_names(self, other: ScriptGraph, feeds: Feeds) -> None:
        """Give tensors the names of those in their place in another graph, whose quantized operators are plain.

        Both are run on `feeds`: tensors of other shapes are not in the same place. Of those that are whole numbers here
        the scale and zero point are learned, and what is given from outside is rounded to them.
        """
        seen, theirs_seen = self._seen(feeds), other._seen(feeds)
        mine, theirs = ([node for node in g.nodes if node.kind not in _PASSING] for g in (self, other))
        kinds, others = ([_PLAIN.get(node.kind, node.kind) for node in nodes] for nodes in (mine, theirs))
        matched: dict[str, str] = {}
        for start, twin, size in difflib.SequenceMatcher(a=kinds, b=others, autojunk=False).get_matching_blocks():
            for node, like in zip(mine[start : start + size], theirs[twin : twin + size], strict=True):
                pairs = zip(node.outputs, like.outputs, strict=False)
                matched |= {a: b for a, b in pairs if a in seen and b in theirs_seen
                            and seen[a].shape == theirs_seen[b].shape}  # fmt: skip
        self._taken = {name: matched.get(name, f"own:{name}") for node in self.nodes for name in node.outputs}
        self._grids = {self._taken.get(name, name): (tensor.q_scale(), tensor.q_zero_point(), tensor.dtype)
                       for name, tensor in seen.items()
                       if tensor.is_quantized and tensor.qscheme() == torch.per_tensor_affine}  # fmt: skip
        self.nodes = self._read()

    def _seen(self, feeds: Feeds) -> dict[str, Tensor]:
        """Every tensor that the graph computes of some feeds."""
        graph, asked, arguments = self._cut([name for node in self.nodes for name in node.outputs], feeds)
        return dict(zip(asked, self._tensors(graph, arguments), strict=True))

    def _name(self, value: Any) -> str:
        """What a tensor is called: inputs and outputs as in the signature."""
        name = str(value.debugName())
        found = self._fed.get(name) or self._results.get(name) or name
        return self._taken.get(found, found)

    def _node(self, node: Any, index: int) -> CutNode:
        inputs: dict[int, str] = {}
        constants: dict[int, str] = {}
        for position, value in enumerate(node.inputs()):
            known = value.debugName() in self._constants
            (constants if known else inputs)[position] = self._name(value)
        weights = (self.constant(name) for name in constants.values())
        owner = next((self._owners[key] for w in weights if w is not None and (key := _fingerprint(w)) in self._owners),
                     "")  # fmt: skip
        outputs = tuple(self._name(value) for value in node.outputs())
        kind = str(node.kind())
        if self._grids.keys() & {*outputs}:
            kind = f"{_WHOLE}{kind.rpartition('::')[2]}"  # also those that only pass whole numbers on, such as pooling
        return CutNode(f"{node.kind()} {outputs[0] if outputs else index}", kind, inputs, outputs, constants, owner,
                       {"values": self._numbers(node)})  # fmt: skip

    def _numbers(self, node: Any) -> list[Any]:
        """Constant arguments that are no tensors: axes, sizes, scales."""
        given = [self._constants[v.debugName()].output().toIValue() for v in node.inputs()
                 if v.debugName() in self._constants]  # fmt: skip
        return [value for value in given if isinstance(value, bool | int | float | str | list)]

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant tensor."""
        node = self._constants.get(name)
        value = None if node is None else node.output().toIValue()
        return value.detach().numpy() if isinstance(value, Tensor) and not value.is_quantized else None

    def stored(self, node: CutNode) -> Stored | None:
        """The weight inside a quantized linear or convolutional layer."""
        unpack = next((_UNPACK[kind] for kind in _UNPACK if node.kind.startswith(kind)), None)
        # A linear that rounds its input itself has that one's scale and zero point before its weight.
        packed = self._constants.get(node.constants.get(3 if "q_dq" in node.kind else 1, ""))
        if unpack is None or packed is None:
            return None
        weight = unpack(packed.output().toIValue())[0]
        if weight.qscheme() == torch.per_tensor_affine:
            steps = np.array(weight.q_scale())
        else:
            steps = weight.q_per_channel_scales().double().numpy().reshape(-1, *(1,) * (weight.dim() - 1))
        return Stored(weight.dequantize().double().numpy(), steps)

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The sub-graph between `given` and `wanted`; see CutGraph. Numbers and lists are no tensors: left out."""
        graph, asked, arguments = self._cut(wanted, given)
        try:
            tensors = self._tensors(graph, arguments)
        except RuntimeError as error:
            raise BackendFailed("DT504", f"TorchScript must run the cut graph (got: {error})"[:2000]) from error
        return {name: (tensor.dequantize() if tensor.is_quantized else tensor).numpy()
                for name, tensor in zip(asked, tensors, strict=True)}  # fmt: skip

    def _cut(self, wanted: Sequence[str], given: Feeds) -> tuple[Any, list[str], list[Tensor]]:
        """The sub-graph, the wanted names that are tensors, and what it takes."""
        graph = self._script.graph.copy()
        names = map(self._name, _values(self._script.graph))  # the copy's own differ, its order does not
        values = dict(zip(names, _values(graph), strict=True))
        arguments = []
        for name, array in given.items():
            if name in values:
                fed = graph.addInput()
                fed.setType(values[name].type())
                values[name].replaceAllUsesWith(fed)
                tensor, grid = torch.from_numpy(np.array(array)), self._grids.get(name)
                arguments.append(torch.quantize_per_tensor(tensor, *grid) if grid else tensor)
        asked = [name for name in wanted if _is_tensor(values[name])]
        while list(graph.outputs()):
            graph.eraseOutput(0)
        for name in asked:
            graph.registerOutput(values[name])
        graph.makeMultiOutputIntoTuple()
        return graph, asked, arguments

    def _tensors(self, graph: Any, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
        torch._C._jit_pass_dce(graph)
        for _ in self._fed:  # nothing reads them any more; the first input is the module, which holds int8 weights
            graph.eraseInput(1)
        with torch.inference_mode(), quiet_jit(), no_fast_path(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r"torch\.(ao\.quantization is deprecated|quantize_per_)")
            return as_tuple(torch._C._create_function_from_graph("cut", graph)(self._script, *arguments))


def _returned(graph: Any) -> list[Any]:
    """The tensors that come out: one, or those of a tuple."""
    value = next(iter(graph.outputs()))
    return list(value.node().inputs()) if value.node().kind() == "prim::TupleConstruct" else [value]


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs()
    for node in graph.nodes():
        yield from node.outputs()


def _is_tensor(value: Any) -> bool:
    return str(value.type()) == "Tensor"


def _fingerprint(weight: Any) -> tuple[Any, ...]:
    """What two equal weights have in common: their shape and some of their numbers."""
    flat = np.asarray(weight.detach() if isinstance(weight, Tensor) else weight).ravel()
    picked = flat[:: max(1, flat.size // 16)][:32]
    return (flat.size, *picked.tolist())

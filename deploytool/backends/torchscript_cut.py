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
from deploytool.backends.cut import CutNode
from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.torchscript import ENTRY, save_traced, torch_jit
from deploytool.cases import read_cases
from deploytool.errors import BackendFailed
from deploytool.load.flat import no_fast_path
from deploytool.load.model import open_source
from deploytool.signature import Feeds, Outputs, Signature
from deploytool.source import ModelRef

_CONSTANT = "prim::Constant"
_HOLDING = ("prim::GetAttr",)  # weights of quantized layers
_PLAIN = {"quantized::linear_dynamic": "aten::linear", "quantized::linear": "aten::linear",
          "aten::quantized_lstm": "aten::lstm", "quantized::embedding_byte": "aten::embedding"}  # fmt: skip


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[ScriptGraph, ScriptGraph]:
    """The model traced anew in fp32, as the artifact was, and the artifact's graph."""
    if artifact.backend == "fbgemm":
        torch.backends.quantized.engine = "fbgemm"
    source = open_source(ModelRef(**ref))
    feeds = max((case.inputs for case in read_cases(prepared / "calibration")), key=lambda f: _rank(artifact, f))
    arguments = tuple(tensor.clone() for tensor in positional(artifact.signature, feeds))
    owners = {_fingerprint(weight): name.rpartition(".")[0] for name, weight in source.module.named_parameters()}
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        path = Path(folder) / ENTRY
        save_traced(source.flat, arguments, path)
        reference = ScriptGraph(_load(path), artifact.signature, owners)
    candidate = ScriptGraph(_load(artifact.main_file), artifact.signature, {})
    candidate.take_names(reference)
    return reference, candidate


def _load(path: Path) -> Any:
    with torch_jit(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.(ao\.quantization is deprecated|quantize_per_)")
        return torch.jit.load(str(path), map_location="cpu")


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
        self.outputs = tuple(signature.output_names)
        self.nodes = self._read()

    def _read(self) -> tuple[CutNode, ...]:
        nodes = enumerate(self._script.graph.nodes())
        return tuple(self._node(node, index) for index, node in nodes if node.kind() != _CONSTANT)

    def take_names(self, other: ScriptGraph) -> None:
        """Give tensors the names of those in their place in another graph, whose quantized operators are plain."""
        mine, theirs = ([node for node in g.nodes if node.kind not in _HOLDING] for g in (self, other))
        kinds, others = ([_PLAIN.get(node.kind, node.kind) for node in nodes] for nodes in (mine, theirs))
        matched: dict[str, str] = {}
        for start, twin, size in difflib.SequenceMatcher(a=kinds, b=others, autojunk=False).get_matching_blocks():
            for node, like in zip(mine[start : start + size], theirs[twin : twin + size], strict=True):
                matched |= dict(zip(node.outputs, like.outputs, strict=False))
        self._taken = {name: matched.get(name, f"own:{name}") for node in mine for name in node.outputs}
        self.nodes = self._read()

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
        return CutNode(f"{node.kind()} {outputs[0] if outputs else index}", str(node.kind()), inputs, outputs,
                       constants, owner, {"values": self._numbers(node)})  # fmt: skip

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

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The sub-graph between `given` and `wanted`; see CutGraph. Numbers and lists are no tensors: left out."""
        graph = self._script.graph.copy()
        names = map(self._name, _values(self._script.graph))  # the copy's own differ, its order does not
        values = dict(zip(names, _values(graph), strict=True))
        arguments = []
        for name, array in given.items():
            if name in values:
                fed = graph.addInput()
                fed.setType(values[name].type())
                values[name].replaceAllUsesWith(fed)
                arguments.append(torch.from_numpy(np.array(array)))
        asked = [name for name in wanted if _is_tensor(values[name])]
        while list(graph.outputs()):
            graph.eraseOutput(0)
        for name in asked:
            graph.registerOutput(values[name])
        graph.makeMultiOutputIntoTuple()
        try:
            return self._call(graph, asked, arguments)
        except RuntimeError as error:
            raise BackendFailed("DT504", f"TorchScript must run the cut graph (got: {error})"[:2000]) from error

    def _call(self, graph: Any, asked: Sequence[str], arguments: Sequence[Tensor]) -> Outputs:
        torch._C._jit_pass_dce(graph)
        for _ in self._fed:  # nothing reads them any more; the first input is the module, which holds int8 weights
            graph.eraseInput(1)
        with torch.inference_mode(), torch_jit(), no_fast_path():
            results = torch._C._create_function_from_graph("cut", graph)(self._script, *arguments)
        tensors = as_tuple(results)
        return {name: tensor.numpy() for name, tensor in zip(asked, tensors, strict=True)}


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

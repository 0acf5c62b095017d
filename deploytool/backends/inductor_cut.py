"""Cuts what AOTInductor packages were compiled of: the exported program that a build keeps beside its package.

Nothing can be given to a compiled library from outside, or asked of it in between. Its program is run node by node by
PyTorch instead, and it stands for the package where both give the same. Where they do not, the pieces that are asked
for are compiled as the package was, so that what the compiler does to them is seen. A package that is not what its
program compiles to is refused: no piece of another program says anything of it.
"""

from __future__ import annotations

import difflib
import importlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx import Graph, GraphModule, Node
from torch.nn.utils.fusion import fuse_conv_bn_weights

from deploytool.artifact import KEPT, Artifact
from deploytool.backends.base import open_artifact
from deploytool.backends.cut import CutNode, Stored
from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.exported import export_module, quiet
from deploytool.backends.inductor import AVX2, PROGRAM, compile_package, load_package
from deploytool.backends.torchscript_cut import example_of
from deploytool.cases import read_cases
from deploytool.difference import root_mean_square
from deploytool.errors import BackendFailed, DeployError, InputRefused
from deploytool.load.model import open_source
from deploytool.signature import Feeds, Outputs, Signature
from deploytool.source import ModelRef
from deploytool.storage import sha256_file

_PREFIX = "module."  # of what FlatModule wraps
_UNROUND = "quantized_decomposed::dequantize_per_channel"
# What a quantizer adds between operators; a graph's order of the others is the same.
_PASSING = ("quantized_decomposed::", "aten::sym_size", "aten::expand", "getitem")
# Relative errors: the compiler sums in another order, and what lies between two codes may fall to either.
_SAME = {"fp32": 1e-4, "int8": 1e-2}


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[ProgramGraph, ProgramGraph]:
    """The model exported anew, and the program that the package was compiled of.

    Raises InputRefused DT313 where no program was kept, or the package is not what it compiles to.
    """
    kept = artifact.folder / KEPT / PROGRAM
    if not kept.is_file() or sha256_file(kept) != artifact.settings.get("program"):
        raise InputRefused("DT313", f"only a package that has the program that it was compiled of beside it, at "
                           f"{KEPT}/{PROGRAM}, can be bisected (it is not there, or not the one)",
                           fix="export it again with keep_program = true in [build]")  # fmt: skip
    source, feeds = open_source(ModelRef(**ref)), example_of(artifact, prepared)
    arguments = tuple(tensor.clone() for tensor in positional(artifact.signature, feeds))
    plain = export_module(source.flat, artifact.signature, arguments)
    importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators of rounding
    with quiet():
        program = torch.export.load(kept)
    settings = AVX2 if artifact.target.get("build", {}).get("cpu") == "avx2" else {}
    reference = ProgramGraph(plain, artifact.signature, feeds, folded=artifact.precision == "int8")
    candidate = ProgramGraph(program, artifact.signature, feeds, settings=settings)
    candidate.compiled = _is_compiled_otherwise(artifact, prepared, candidate)
    candidate.take_names(reference, feeds)
    return reference, candidate


def _is_compiled_otherwise(artifact: Artifact, prepared: Path, candidate: ProgramGraph) -> bool:
    """Whether the package gives something else than its program; InputRefused where nor does it compiled anew."""
    limit, outputs = _SAME[artifact.precision], candidate.outputs
    with open_artifact(artifact) as runner:
        for case in read_cases(prepared / "cases"):
            try:
                got: Outputs = runner.run(case.inputs)
            except BackendFailed:
                got = {}
            if _distance(candidate.run(outputs, case.inputs), got) > limit:
                _check_compiled(candidate, case.inputs, got, limit)
                return True
    return False


def _check_compiled(candidate: ProgramGraph, inputs: Feeds, got: Outputs, limit: float) -> None:
    try:
        anew = candidate.run_compiled(candidate.outputs, inputs)
    except BackendFailed:
        anew = {}
    if anew.keys() != got.keys() or (got and _distance(anew, got) > limit):
        raise InputRefused("DT313", "the package must be what the program beside it compiles to here (it gives other "
                           "outputs than the program, run by PyTorch or compiled anew)",
                           fix="export it again: it was changed, or compiled by another torch")  # fmt: skip


def _distance(wanted: Outputs, got: Outputs) -> float:
    """The largest relative error of an output; infinite where one is missing, misshapen or not finite."""
    return max((_error(array, got.get(name)) for name, array in wanted.items()), default=math.inf)


def _error(wanted: np.ndarray, got: np.ndarray | None) -> float:
    if got is None or wanted.shape != got.shape or not np.isfinite(got).all():
        return math.inf
    return root_mean_square(got - wanted) / (root_mean_square(wanted) or 1.0)


class ProgramGraph:
    """An exported program whose nodes PyTorch runs one by one; see CutGraph.

    compiled   whether sub-graphs between given and wanted tensors are compiled by AOTInductor instead
    """

    def __init__(
        self, program: ExportedProgram, signature: Signature, example: Feeds, *, folded: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.compiled, self._settings, self._signature, self._example = False, settings or {}, signature, example
        self._module: GraphModule = program.module(check_guards=False)
        if folded:
            _fold(self._module)
        self._module.graph.eliminate_dead_code()
        graph = self._module.graph
        fed = [node for node in graph.nodes if node.op == "placeholder"]
        self._names = dict(zip(fed, signature.input_names, strict=True))
        returned = as_tuple(next(iter(graph.find_nodes(op="output"))).args[0])
        self._results: dict[str, Any] = dict(zip(signature.output_names, returned, strict=True))
        self._names |= {node: name for name, node in self._results.items() if node not in self._names}
        self.outputs = tuple(signature.output_names)
        self.nodes = self._read()

    def _read(self) -> tuple[CutNode, ...]:
        self._by_name = {self._name(node): node for node in self._module.graph.nodes} | self._results
        return tuple(self._node(node) for node in self._module.graph.nodes if node.op == "call_function")

    def _name(self, node: Node) -> str:
        return self._names.get(node) or str(node.name)

    def _node(self, node: Node) -> CutNode:
        inputs: dict[int, str] = {}
        constants: dict[int, str] = {}
        for position, given in enumerate(_flat(node.args)):
            if isinstance(given, Node):
                (constants if given.op == "get_attr" else inputs)[position] = self._name(given)
        stack = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
        values = [given for given in _flat(node.args) if isinstance(given, bool | int | float | str)]
        return CutNode(f"{_kind(node)} {self._name(node)}", _kind(node), inputs, (self._name(node),), constants,
                       str(stack[-1][0]).removeprefix(_PREFIX), {"values": values})  # fmt: skip

    def take_names(self, other: ProgramGraph, feeds: Feeds) -> None:
        """Give tensors the names of those in their place in another graph; what only this one has keeps its own."""
        seen, theirs_seen = (g.run([node.outputs[0] for node in g.nodes], feeds) for g in (self, other))
        mine, theirs = ([node for node in g.nodes if not node.kind.startswith(_PASSING)] for g in (self, other))
        kinds, others = ([node.kind for node in nodes] for nodes in (mine, theirs))
        matched: dict[str, str] = {}
        for start, twin, size in difflib.SequenceMatcher(a=kinds, b=others, autojunk=False).get_matching_blocks():
            pairs = zip(mine[start : start + size], theirs[twin : twin + size], strict=True)
            matched |= {a.outputs[0]: b.outputs[0] for a, b in pairs if a.outputs[0] in seen
                        and b.outputs[0] in theirs_seen
                        and seen[a.outputs[0]].shape == theirs_seen[b.outputs[0]].shape}  # fmt: skip
        fixed = {*self._signature.input_names, *self.outputs}
        self._names |= {node: matched.get(node.name, f"own:{node.name}") for node in self._module.graph.nodes
                        if node.op == "call_function" and self._name(node) not in fixed}  # fmt: skip
        self.nodes = self._read()

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant tensor."""
        node = self._by_name.get(name)
        return _constant(self._module, node).numpy() if node is not None and node.op == "get_attr" else None

    def stored(self, node: CutNode) -> Stored | None:
        """The weight that a node turns back from int8 codes."""
        if not node.kind.startswith(_UNROUND):
            return None
        codes, scale, zero = (_constant(self._module, given) for given in self._by_name[node.outputs[0]].args[:3])
        steps, zeros = (t.double().reshape(-1, *(1,) * (codes.dim() - 1)) for t in (scale, zero))
        return Stored(((codes.double() - zeros) * steps).numpy(), steps.numpy())

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The wanted tensors; see CutGraph. Numbers and lists are no tensors: left out."""
        if self.compiled and given and not {*wanted} & {*given}:
            return self.run_compiled(wanted, given)
        return self._run_plainly(wanted, given)

    def _run_plainly(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        values: dict[Node, Any] = {}
        tensors = {self._by_name[name]: torch.from_numpy(np.array(array)) for name, array in given.items()
                   if name in self._by_name}  # fmt: skip
        needed = self._needed(wanted, given)
        try:
            with torch.inference_mode(), quiet():
                for node in self._module.graph.nodes:
                    if node in needed:
                        values[node] = self._value(node, values, tensors)
        except Exception as error:  # operators raise in their own ways
            raise BackendFailed("DT504", f"PyTorch must run the cut program (got: {error})"[:2000]) from error
        found = {name: values[self._by_name[name]] for name in wanted}
        return {name: value.numpy() for name, value in found.items() if isinstance(value, Tensor)}

    def _value(self, node: Node, values: Mapping[Node, Any], given: Mapping[Node, Tensor]) -> Any:
        if node.op == "placeholder":
            return given[node]
        if node.op == "get_attr":
            return _constant(self._module, node)

        def read(argument: Node) -> Any:
            return given[argument] if argument in given else values[argument]

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), read)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _needed(self, wanted: Sequence[str], given: Feeds) -> set[Node]:
        """Nodes to compute: what is given is read as it is."""
        stops = {self._by_name[name] for name in given if name in self._by_name}
        ahead = [self._by_name[name] for name in wanted]
        found: set[Node] = {*ahead}
        while ahead:
            fresh = [node for node in ahead.pop().all_input_nodes if node not in found and node not in stops]
            found.update(fresh)
            ahead += fresh
        return found

    def run_compiled(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The wanted tensors, as AOTInductor computes them from the given ones in one piece."""
        asked = [name for name in wanted if isinstance(self._by_name[name].meta.get("val"), Tensor)]
        piece, fed = self._piece(asked, given)
        arguments = tuple(torch.from_numpy(np.array(given[name])) for name in fed)
        # Exported with the sizes that the package was: torch fixes a size of 1.
        inside = [name for name in fed if name not in self._example]
        shown = {**self._example, **self._run_plainly(inside, self._example)}
        example = tuple(torch.from_numpy(np.array(shown[name])) for name in fed)
        sizes = tuple({axis: Dim.AUTO for axis, size in enumerate(self._by_name[name].meta["val"].shape)
                       if isinstance(size, torch.SymInt)} for name in fed)  # fmt: skip
        with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
            try:
                with torch.no_grad(), quiet():
                    program = torch.export.export(piece, example, dynamic_shapes=sizes, strict=False)
                compile_package(program, path := Path(folder) / "piece.pt2", {**self._settings})
                with torch.inference_mode():
                    outputs = as_tuple(load_package(path)(*arguments))
            except DeployError:
                raise
            except Exception as error:  # what export raises has no common base
                raise BackendFailed("DT504", f"AOTInductor must run the cut program (got: {error})"[:2000]) from error
            return {name: np.array(tensor.numpy()) for name, tensor in zip(asked, outputs, strict=True)}

    def _piece(self, wanted: Sequence[str], given: Feeds) -> tuple[GraphModule, list[str]]:
        """A module of the nodes between given and wanted tensors, and the names of what it takes."""
        needed, graph = self._needed(wanted, given), Graph()
        read = {argument for node in needed for argument in node.all_input_nodes} | {*needed}
        fed = [name for name in given if self._by_name.get(name) in read]
        copies: dict[Node, Node] = {self._by_name[name]: graph.placeholder(f"fed_{i}") for i, name in enumerate(fed)}
        for node in self._module.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, lambda argument: copies[argument])
        graph.output(tuple(copies[self._by_name[name]] for name in wanted))
        return GraphModule(self._module, graph), fed


def _flat(arguments: Any) -> Iterator[Any]:
    """Arguments in their order, lists of tensors spread out."""
    for argument in arguments:
        if isinstance(argument, tuple | list) and any(isinstance(part, Node) for part in argument):
            yield from argument
        else:
            yield argument


def _kind(node: Node) -> str:
    """The operator, such as "aten::linear"."""
    schema = getattr(node.target, "_schema", None)
    name: Any = schema.name if schema is not None else getattr(node.target, "__name__", node.target)
    return str(name)


def _constant(module: GraphModule, node: Any) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor.detach()


def _fold(module: GraphModule) -> None:
    """Put normalizations into the convolutions before them, as quantizers do."""
    for node in list(module.graph.nodes):
        made = node.args[0] if node.args else None
        if _kind(node) != "aten::batch_norm" or not isinstance(made, Node) or len(made.users) > 1:
            continue
        if not _kind(made).startswith("aten::conv"):
            continue
        weight, bias = made.args[1], made.args[2] if len(made.args) > 2 else None
        given = (weight, bias, *node.args[1:5])
        if any(read is not None and read.op != "get_attr" for read in given):  # computed, as weight_norm's weight is
            continue
        kernel, offset, gamma, beta, mean, variance = (None if read is None else _constant(module, read)
                                                       for read in given)  # fmt: skip
        if kernel is None or mean is None or variance is None:
            continue
        fused = fuse_conv_bn_weights(kernel, offset, mean, variance, float(node.args[7]), gamma, beta,
                                     transpose="conv_transpose" in _kind(made))  # fmt: skip
        names = [f"folded_{made.name}_{end}" for end in ("weight", "bias")]
        with module.graph.inserting_before(made):
            for index, (name, tensor) in enumerate(zip(names, fused, strict=True)):
                module.register_buffer(name, tensor.detach())
                made.args = (*made.args[: index + 1], module.graph.get_attr(name), *made.args[index + 2 :])
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    module.recompile()

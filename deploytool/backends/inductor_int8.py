"""AOTInductor with int8 layers computed by oneDNN on x86 CPUs: a program quantized by torchao's PT2E, then compiled.

Linears are dynamic, with weights of 7 bits per output channel and activations of 8 bits, as in fbgemm.py, and those
that cost most stay fp32. Convolutions are static, in ranges of calibration feeds; where they prevail, linears too.
torchao is needed to build alone: the package runs with torch.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from deploytool.artifact import Artifact
from deploytool.backends import saturation, sensitivity, tables
from deploytool.backends.base import Built, Request, find_backend, source_of
from deploytool.backends.exported import export_module
from deploytool.backends.inductor import ENTRY, exported, instructions, keep_program, open_package, write_package
from deploytool.backends.linear_ranking import LinearRanking, check_names, plain_linears
from deploytool.backends.ran_inductor import int8_calls
from deploytool.backends.torchscript_make import example
from deploytool.backends.used_settings import unused_beside_grids
from deploytool.errors import EnvironmentLacking, InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.runner import Runner
from deploytool.signature import Feeds, Signature
from deploytool.source import Source

_PREFIX = "module."  # of what FlatModule wraps
_UNROUND = "quantized_decomposed.dequantize_per_channel"
_METHODS = ("histogram", "min-max", "percentile")


@dataclass(frozen=True)
class InductorInt8:
    """Builds `model.pt2` from a live module, which is not changed."""

    def build(self, request: Request) -> Built:
        """Export, quantize, compile; raises InputRefused when nothing becomes int8."""
        options = tables.InductorInt8Build(**request.target.build)
        source = source_of(request)
        check_names(source.flat, options.exclude)
        search = _Search(source, request, options)
        program, settings = search.best()
        told = write_package(program, request, options.cpu)
        kernels = int8_calls(told["calls"])
        if not kernels:
            raise InputRefused("DT310", "oneDNN must have whole-number kernels for some layer (Inductor found none)",
                               fix="choose an fp32 target, or ort-int8")  # fmt: skip
        settings |= {"cpu": instructions(request.out / ENTRY), "int8_kernels": kernels,
                     "rounded_but_fp32": search.calls - kernels,
                     **keep_program(program, request, options)}  # fmt: skip
        return Built("pt2", ENTRY, "int8", settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt2`; see inductor.open_package."""
        return open_package(artifact)


class _Search:
    """Decides what is rounded how, and tries the ways to calibrate."""

    def __init__(self, source: Source, request: Request, options: tables.InductorInt8Build) -> None:
        self.source, self.request, self.options = source, request, options
        self.signature = source.signature
        self.program = widened(exported(source, example(request)), self.signature)
        self.torchao: Any = _quantizer()
        self.pt2e: Any = importlib.import_module("deploytool.backends.pt2e")
        self.layers = self._layers()
        self.calls = 0

    def best(self) -> tuple[ExportedProgram, dict[str, Any]]:
        """The quantized program that loses least on the calibration feeds, and what the artifact says of it."""
        static, dynamic, kept, scheme = self._plan()
        if not static and not dynamic:
            raise InputRefused("DT310", "the model must hold linears or convolutions that can become int8 (got none)",
                               fix='set scheme = "static", or choose an fp32 target')  # fmt: skip
        self.calls = sum(count for layer, (_, count) in self.layers.items() if layer in {*static, *dynamic})
        feeds = sensitivity.spread(self.request.calibration(), self.options.calibration_samples if static else 1)
        calibrated = bool(static) and scheme != "learned"
        methods = _METHODS if self.options.calibration == "auto" else (self.options.calibration,)
        tried: dict[str, tuple[float, Any]] = {}
        reference = self._outputs(self.program, feeds)
        for method in methods if calibrated else methods[:1]:
            plan = self.torchao.Plan(dynamic, static, scheme != "learned", method, self.options.weight_bits)
            result = self.pt2e.quantize(self.program, self.torchao.InductorQuantizer(plan), feeds, self.signature,
                                        self.source.encodings)  # fmt: skip
            losses = map(sensitivity.sample_loss, reference, self._outputs(result.program, feeds))
            tried[method] = (max(losses), result)
        method = min(tried, key=lambda name: tried[name][0])
        loss, result = tried[method]
        kinds = Counter(kind for layer, (kind, _) in self.layers.items() if layer in {*static, *dynamic})
        bits = self.options.weight_bits if scheme != "learned" else self._learned_bits()
        settings = {"scheme": scheme, "int8": dict(kinds), "kept_fp32": [*self.options.exclude, *kept],
                    "weight_bits": bits, **_learned(result.learned),
                    **(_saturation(result.program) if self._may_saturate(result.learned) else {})}  # fmt: skip
        if scheme == "learned":
            own_bits = () if set(static) <= set(result.learned.weights) else ("weight_bits",)
            settings |= unused_beside_grids(self.options, but=("exclude", *own_bits))
        if calibrated:
            settings |= {"calibration": method, "calibration_feeds": len(feeds), "calibration_loss": loss}
        return separated(result.program, self.signature), settings

    def _plan(self) -> tuple[list[str], list[str], list[str], str]:
        """Static layers, dynamic layers, linears that were measured and stay fp32, and the scheme."""
        excluded = self._own_names(self.options.exclude)
        layers = {layer: kind for layer, (kind, _) in self.layers.items() if layer not in excluded}
        learned = [layer for layer in self._with_grids() if layer in layers]
        if self.options.scheme == "auto" and learned:
            return learned, [], [], "learned"
        convolutions = [layer for layer, kind in layers.items() if kind != "Linear"]
        linears = [layer for layer, kind in layers.items() if kind == "Linear"]
        if self.options.scheme == "static" or (self.options.scheme == "auto" and len(convolutions) > len(linears)):
            return [*convolutions, *linears], [], [], "static"
        kept = self._kept()
        dynamic = [layer for layer in linears if layer not in self._own_names(kept)]
        return ([] if self.options.scheme == "dynamic" else convolutions), dynamic, kept, "dynamic"

    def _kept(self) -> list[str]:
        """The linears that lose most."""
        module = self.source.flat
        with no_fast_path():
            return LinearRanking(module, plain_linears(module, self.options.exclude), self.request, self.options).kept()

    def _own_names(self, names: Collection[str]) -> set[str]:
        """All names without `module.` that the modules named, and those inside, have: one may stand at two places."""
        modules = dict(self.source.flat.named_modules(remove_duplicate=False))
        chosen = {id(inner) for name in names for inner in modules[name].modules()}
        return {name.removeprefix(_PREFIX) for name, module in modules.items() if id(module) in chosen}

    def _layers(self) -> dict[str, tuple[str, int]]:
        """Kind, and number of calls, of every layer whose weight is a constant."""
        kinds = {self.torchao.LINEAR: "Linear"} | dict.fromkeys(self.torchao.CONVOLUTIONS, "Conv")
        found = [(self.pt2e.layer_of(node), kinds[node.target])
                 for node in self.program.module(check_guards=False).graph.nodes if node.target in kinds]  # fmt: skip
        counts = Counter(layer for layer, _ in found)
        return {layer: (kind, counts[layer]) for layer, kind in found if layer}

    def _with_grids(self) -> list[str]:
        grids: list[str] = self.pt2e.layers_with_grids(self.program)
        return grids

    def _outputs(self, program: ExportedProgram, feeds: Sequence[Feeds]) -> list[list[Any]]:
        module = program.module(check_guards=False)
        return [[tensor.numpy() for tensor in self.pt2e.run_module(module, self.signature, one)] for one in feeds]

    def _learned_bits(self) -> int:
        return max((encoding.bits for encoding in self.source.encodings.values()), default=self.options.weight_bits)

    def _may_saturate(self, learned: Any) -> bool:
        return self.options.weight_bits == 8 or bool(learned.weights)


def _quantizer() -> Any:
    try:
        return importlib.import_module("deploytool.backends.inductor_quantizer")
    except ImportError as error:
        raise EnvironmentLacking("DT401", f"building inductor-int8 must be able to import torchao (got: {error})",
                                 fix=find_backend("inductor_int8").fix) from error  # fmt: skip


def _learned(learned: Any) -> dict[str, Any]:
    """What the settings say of scales that the model has learned; nothing where it has none."""
    if not (learned.inputs or learned.weights or learned.not_taken):
        return {}
    return {"encoded": len({*learned.inputs, *learned.weights}), "encodings_not_taken": dict(learned.not_taken)}


def _saturation(program: ExportedProgram) -> dict[str, Any]:
    """How many of the weights saturate on CPUs without VNNI; those refuse such a package."""
    weights = [(name, tensor.numpy(), 0) for name, tensor in program.state_dict.items()
               if tensor.dtype is torch.int8 and tensor.dim() > 1]  # fmt: skip
    return {"needs_vnni": saturation.counted(weights)}


def widened(program: ExportedProgram, signature: Signature) -> ExportedProgram:
    """The program with a second channel of zero weight for convolutions over one channel.

    With free sizes Inductor takes the output of such a convolution to lie in its memory as the input does, which may be
    read as either layout; oneDNN's whole-number kernel always puts channels last, and what follows reads nonsense
    (torch 2.13, _inductor/mkldnn_ir.py). The kernel pads channels anyway.
    """
    module: GraphModule = program.module(check_guards=False)
    single = [node for node in module.graph.nodes if _is_over_one_channel(module, node)]
    for node in single:
        _give_twice(module, node)
    for weight in dict.fromkeys(str(node.args[1].target) for node in single):  # a layer may be called twice
        _pad(module, weight)
    return _exported_again(module, program, signature) if single else program


def separated(program: ExportedProgram, signature: Signature) -> ExportedProgram:
    """The program with whole-number weights of their own for each of several layers that share one.

    Inductor has kernels for weights that are read once; each packs its own copy.
    """
    module: GraphModule = program.module(check_guards=False)
    readers = [(node, user) for node in module.graph.nodes if str(node.target).startswith(_UNROUND)
               for user in list(node.users)]  # fmt: skip
    read = Counter[str]()
    for node, user in readers:
        weight = str(node.args[0].target)
        if read[weight]:
            name = f"{weight.replace('.', '_')}_{read[weight]}"
            module.register_buffer(name, _attribute(module, node.args[0]).detach().clone())
            with module.graph.inserting_before(user):
                own = module.graph.get_attr(name)
                user.replace_input_with(node, module.graph.call_function(node.target, (own, *node.args[1:])))
        read[weight] += 1
    if len(read) == len(readers):
        return program
    module.graph.eliminate_dead_code()
    return _exported_again(module, program, signature)


def _exported_again(module: GraphModule, program: ExportedProgram, signature: Signature) -> ExportedProgram:
    """The changed module as a program, exported with the example inputs that it was made with."""
    module.recompile()
    arguments, _ = program.example_inputs or ((), {})
    return export_module(module, signature, tuple(arguments))


def _is_over_one_channel(module: GraphModule, node: Node) -> bool:
    """Whether a node is such a convolution; transposed ones have their outputs where these have their inputs."""
    kind = str(node.target)
    if not kind.startswith("aten.conv") or "transpose" in kind or len(node.args) > 6:  # the seventh is groups
        return False
    weight: Any = node.args[1]
    return isinstance(weight, Node) and weight.op == "get_attr" and _attribute(module, weight).shape[1] == 1


def _give_twice(module: GraphModule, node: Node) -> None:
    """Let a convolution read its one channel as two; a learned grid stays right before the layer."""
    given: Any = node.args[0]
    reader = node
    while isinstance(given, Node) and "quantize_per_tensor" in str(given.target):
        given, reader = given.args[0], given
    sizes = [-1] * given.meta["val"].dim()
    sizes[1 - _attribute(module, node.args[1]).dim()] = 2  # counted from the end: a batch need not be there
    with module.graph.inserting_before(reader):
        reader.update_arg(0, module.graph.call_function(torch.ops.aten.expand.default, (given, sizes)))


def _pad(module: GraphModule, target: str) -> None:
    """A second channel of zeros for a weight [outputs, 1, *kernel]."""
    owner, _, name = target.rpartition(".")
    parent = module.get_submodule(owner)
    weight: Tensor = getattr(parent, name)
    setattr(parent, name, nn.Parameter(torch.cat([weight, torch.zeros_like(weight)], dim=1), requires_grad=False))


def _attribute(module: GraphModule, node: Any) -> Tensor:
    owner, _, name = str(node.target).rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(owner), name)
    return tensor


BACKEND = InductorInt8()

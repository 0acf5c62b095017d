"""TorchScript with int8 layers, computed by fbgemm on x86 CPUs and by QNNPACK on ARM (quantized_engine.py): dynamic
here, static in fbgemm_static.py, with the scales that the model has learned in fbgemm_learned.py.

Linears get weights of 7 bits per output channel and activations of 8 bits: 255 * 64 * 2 stays below 32,767, so the
16-bit sums of CPUs without VNNI cannot saturate. torch's own scheme cuts the activations to 7 bits instead, which
costs more (MiniLM's worst cosine 0.968 against 0.985). The linears that cost most stay fp32 (sensitivity.py).
torch calls its eager quantization deprecated; all of it stays in this file.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.ao import quantization
from torch.ao.nn import quantized
from torch.ao.nn.quantized import dynamic

from deploytool.artifact import Artifact
from deploytool.backends import tables
from deploytool.backends.base import Built, Request, source_of
from deploytool.backends.eager import positional
from deploytool.backends.fbgemm_learned import has_learned, quantize_learned
from deploytool.backends.fbgemm_static import is_mostly_convolution, quantize_static
from deploytool.backends.linear_ranking import LinearRanking, check_names, is_inside, plain_linears
from deploytool.backends.quantized_engine import use_engine, use_engine_of
from deploytool.backends.torchscript import ENTRY, open_script
from deploytool.backends.torchscript_make import save_script
from deploytool.backends.used_settings import unused_beside_grids
from deploytool.errors import InputRefused
from deploytool.load.flat import FlatModule, no_fast_path
from deploytool.load.plain_attention import unfuse, why_fused
from deploytool.runner import Runner
from deploytool.source import Source

_WITH_FULL_ACTIVATIONS = 3  # from version 4 on torch's dynamic Linear cuts activations to 7 bits


@dataclass(frozen=True)
class Fbgemm:
    """Builds `model.pt` from a live module, which is copied and not changed."""

    def build(self, request: Request) -> Built:
        """Quantize a copy, trace or compile, freeze, save; raises InputRefused when nothing can become int8."""
        options = tables.FbgemmBuild(**request.target.build)
        engine = use_engine(options.engine, options.weight_bits)
        built = self._build(request, options)
        return replace(built, settings={**built.settings, "engine": engine})

    def _build(self, request: Request, options: tables.FbgemmBuild) -> Built:
        source = source_of(request)
        if options.scheme == "auto" and has_learned(source.module):
            check_names(source.flat, options.exclude)
            return _build_learned(source, request, options)
        if options.scheme == "static" or (options.scheme == "auto" and is_mostly_convolution(source.module)):
            check_names(source.flat, options.exclude)
            return _build_static(source.module, request, options)
        module = copy.deepcopy(source.flat).eval()
        unfused = unfuse(module)  # torch reads the weights inside as tensors: no layer there could be replaced
        check_names(module, options.exclude)
        with no_fast_path():
            ranking = LinearRanking(module, plain_linears(module, options.exclude), request, options)
            kept = ranking.kept()
        chosen = _chosen(module, options, [name for name in ranking.called if name not in kept])
        done = _convert(module, chosen, options)
        if not done:
            raise InputRefused("DT310", "the model must hold linear or recurrent layers that can become int8 "
                                        f"(got {_kinds(module)})",
                               fix='set scheme = "static", or choose an fp32 target')  # fmt: skip
        with _quiet():
            made = save_script(module, request, options.method, request.out / ENTRY)
        settings: dict[str, Any] = {
            **made,
            "scheme": "dynamic",
            "int8": done,
            "kept_fp32": [*options.exclude, *kept],
            "weight_bits": options.weight_bits,
        }
        if unfused:
            settings["unfused"] = sorted(name.removeprefix("module.") for name in unfused)
        if still := why_fused(module):
            told = "; ".join(f"{name.removeprefix('module.')}: {reason}" for name, reason in still.items())
            settings["note"] = f"projections inside of attention stay fp32, since torch reads them as tensors: {told}"
        return Built("torchscript", ENTRY, "int8", settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt`, packed for the engine that computes here."""
        use_engine_of(artifact.settings)
        with _quiet():
            return open_script(artifact)


def _build_static(module: nn.Module, request: Request, options: tables.FbgemmBuild) -> Built:
    names = request.signature.input_names
    feeds = [dict(zip(names, positional(request.signature, f), strict=True)) for f in request.calibration()]
    converted, done = quantize_static(module, feeds, options)
    flat = FlatModule(converted, names, request.signature.output_names)
    with _quiet():
        made = save_script(flat, request, options.method, request.out / ENTRY)
    settings = {**made, "scheme": "static", "calibration": options.calibration, "calibration_feeds": len(feeds),
                "int8": done, "kept_fp32": list(options.exclude), "weight_bits": options.weight_bits}  # fmt: skip
    return Built("torchscript", ENTRY, "int8", settings=settings)


def _build_learned(source: Source, request: Request, options: tables.FbgemmBuild) -> Built:
    names = request.signature
    with _quiet(), no_fast_path():
        module, settings = quantize_learned(source, options.exclude)
        flat = FlatModule(module, names.input_names, names.output_names)
        made = save_script(flat, request, options.method, request.out / ENTRY)
    settings = settings | unused_beside_grids(options, but=("exclude",))
    return Built("torchscript", ENTRY, "int8", settings={**made, **settings})


def _chosen(module: nn.Module, options: tables.FbgemmBuild, linears: list[str]) -> list[nn.Module]:
    """The modules that become int8."""
    kinds: list[type[nn.Module]] = [nn.LSTM, nn.GRU] if options.recurrent else []
    kinds += [nn.Embedding] if options.embeddings else []
    return [inner for name, inner in module.named_modules()
            if name in linears or (type(inner) in kinds and not is_inside(name, options.exclude))]  # fmt: skip


def _convert(module: nn.Module, chosen: list[nn.Module], options: tables.FbgemmBuild) -> dict[str, int]:
    """Replace the chosen modules in place, a module that is used twice by one; returns how many of each class."""
    with _quiet():
        replaced = {id(inner): _int8(inner, options) for inner in chosen}
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in replaced:
                parent._modules[name] = replaced[id(child)]
    return dict(Counter(type(inner).__name__ for inner in chosen))


def _int8(inner: Any, options: tables.FbgemmBuild) -> nn.Module:
    kinds: dict[type[nn.Module], tuple[Any, Any]] = {
        nn.Linear: (dynamic.Linear, _linear_config(options.weight_bits)),
        nn.Embedding: (quantized.Embedding, quantization.float_qparams_weight_only_qconfig),
        nn.LSTM: (dynamic.LSTM, quantization.default_dynamic_qconfig),
        nn.GRU: (dynamic.GRU, quantization.default_dynamic_qconfig),
    }
    kind, inner.qconfig = kinds[type(inner)]
    result = kind.from_float(inner)
    if type(inner) is nn.Linear and options.weight_bits == 7:
        result.version = _WITH_FULL_ACTIVATIONS
    module: nn.Module = result
    return module


def _linear_config(weight_bits: int) -> quantization.QConfig:
    low, high = (-64, 63) if weight_bits == 7 else (-128, 127)
    return quantization.QConfig(
        activation=quantization.PlaceholderObserver.with_args(dtype=torch.quint8, is_dynamic=True),
        weight=quantization.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=high
        ),
    )


def _kinds(module: nn.Module) -> str:
    return ", ".join(sorted({type(inner).__name__ for inner in module.modules() if not list(inner.children())}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says of the age of its eager quantization."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated")
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_")
        warnings.filterwarnings("ignore", message=r".*reduce_range will be deprecated")
        yield


BACKEND = Fbgemm()

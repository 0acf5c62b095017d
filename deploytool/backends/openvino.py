"""OpenVINO on CPUs: the portable graph as fp32 IR, or quantized by NNCF (openvino_int8.py). Language models keep their
cache in the engine (openvino_states.py)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# OpenVINO's tools and NNCF report their use through this package unless it cannot be imported; both then stay silent.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends import openvino_generate, tables  # noqa: E402
from deploytool.backends.base import Built, Request, portable_of  # noqa: E402
from deploytool.backends.engine import EngineRunner, threads_of  # noqa: E402
from deploytool.backends.openvino_generate import BEAMS, KeptCache, engine_config  # noqa: E402
from deploytool.backends.openvino_scalars import move_scalars  # noqa: E402
from deploytool.backends.openvino_states import cache_pairs, keep_cache  # noqa: E402
from deploytool.backends.shipped_runner import ship  # noqa: E402
from deploytool.decoding import TOKENS  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused  # noqa: E402
from deploytool.runner import Runner  # noqa: E402
from deploytool.signature import Feeds, Signature  # noqa: E402

ENTRY = "model.xml"
GRAPH = "model.onnx"
_NOTHING: Mapping[str, str] = {}
_UNSAVED = "extension"  # the operator set of what only the importer knows


@dataclass(frozen=True)
class OpenVino:
    """Builds `model.xml` and `model.bin` from the portable graph; free dimensions stay free."""

    def build(self, request: Request) -> Built:
        """Import the graph, quantize it for int8, and save it without shrinking fp32 weights to fp16."""
        options = tables.OpenVinoBuild(**request.target.build)
        precision = request.target.precision
        only_weights = precision == "int4" or (precision == "int8" and options.weights_only)
        trained = "input_grids" in portable_of(request).settings
        if trained and precision == "int8" and options.scheme == "auto" and not options.weights_only:
            return _finished(*_learned(request), request, options)
        path = portable_of(request).main_file
        model = _imported(path)
        settings: dict[str, Any] = {}
        # NNCF imports torch and takes seconds: only builds that quantize need it.
        if only_weights:
            from deploytool.backends.openvino_weights import compress_weights

            model, settings = compress_weights(model, request, options)
        elif precision == "int8":
            from deploytool.backends.openvino_int8 import quantize

            model, settings = quantize(model, request, options)
        return _finished(model, settings, request, options)

    def open(self, artifact: Artifact) -> Runner:
        """Compile the IR for the CPU, for what its setting `hint` says."""
        hint = str(artifact.settings.get("hint", "latency"))
        try:
            compiled = compile_ir(ov.Core().read_model(artifact.main_file), threads_of(artifact), hint)
        except RuntimeError as error:
            raise BackendFailed("DT504", f"OpenVINO must compile {artifact.entry} (got: {error})"[:2000]) from error
        kept = bool(artifact.settings.get("stateful"))
        return StatefulRunner(compiled, artifact.signature) if kept else CompiledRunner(compiled, artifact.signature)


def _finished(model: ov.Model, settings: dict[str, Any], request: Request, options: tables.OpenVinoBuild) -> Built:
    """Keep the cache of a language model in the engine and save the model."""
    settings = settings | {"hint": options.hint} | keep_cache(model, request.signature, options.stateful)
    ov.save_model(model, request.out / ENTRY, compress_to_fp16=False)
    if settings.get("stateful") and (request.out / "tokenizer.json").is_file():
        ship(Path(openvino_generate.__file__), request.out)
    return Built("openvino", ENTRY, request.target.precision, settings=settings)


def _learned(request: Request) -> tuple[ov.Model, dict[str, Any]]:
    """The model that was trained on grids, computed with those."""
    from deploytool.backends.onnx_learned import write_learned

    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        settings = write_learned(portable_of(request), replace(request, out=Path(folder)), "openvino")
        model = _imported(Path(folder) / GRAPH)
        move_scalars(model)
        return model, dict(settings)


def _imported(path: Path) -> ov.Model:
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise InputRefused("DT310", f"OpenVINO must be able to import the graph (got: {error})"[:2000]) from error
    _refuse_unsaved(model)
    return model


def _refuse_unsaved(model: ov.Model) -> None:
    """Operators that OpenVINO imports from ONNX Runtime's graphs, but cannot read again from its own format."""
    found = [(op.get_friendly_name(), op.get_type_info()) for op in model.get_ops()]
    foreign = [f"{kind.name}: node {name!r}" for name, kind in found if kind.version_id == _UNSAVED]
    if foreign:
        raise InputRefused("DT310", "the graph must hold operators that OpenVINO's format has "
                           f"(got {', '.join(sorted({line.partition(':')[0] for line in foreign}))})",
                           detail=foreign[:10], fix="give the graph from before ONNX Runtime fused it, or choose "
                           "targets of ONNX Runtime")  # fmt: skip


def compile_ir(model: ov.Model, threads: int, hint: str = "latency") -> ov.CompiledModel:
    """A model compiled for the CPU in the precision that it is written in; raises RuntimeError."""
    return ov.Core().compile_model(model, "CPU", engine_config({"threads": threads, "hint": hint}))


class CompiledRunner(EngineRunner):
    """Runs a compiled model; inputs and outputs are matched by tensor name; those that are `kept` are variables."""

    def __init__(self, compiled: ov.CompiledModel, signature: Signature, kept: Mapping[str, str] = _NOTHING) -> None:
        super().__init__(signature)
        try:
            self.outputs = [compiled.output(name) for name in signature.output_names if name not in kept.values()]
            for name in signature.input_names:
                if name not in kept:
                    compiled.input(name)
        except RuntimeError as error:
            raise BackendFailed("DT504", "the IR must have the inputs and outputs of the signature "
                                         f"(got: {error})"[:2000]) from error  # fmt: skip
        self.request = compiled.create_infer_request()

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """One request; the arrays are the request's own memory until the next."""
        try:
            results = self.request.infer({name: np.ascontiguousarray(array) for name, array in feeds.items()},
                                         share_inputs=True, share_outputs=True)  # fmt: skip
        except RuntimeError as error:
            raise BackendFailed("DT504", f"OpenVINO must run the graph (got: {error})"[:2000],
                                detail=[f"{n}: {list(a.shape)}" for n, a in feeds.items()]) from error  # fmt: skip
        return [results[output] for output in self.outputs]


class StatefulRunner(CompiledRunner):
    """Runs a model that keeps its cache: past inputs become the variables before, present outputs are read after."""

    def __init__(self, compiled: ov.CompiledModel, signature: Signature) -> None:
        self._pairs = cache_pairs(signature)
        super().__init__(compiled, signature, self._pairs)
        self._compiled = compiled
        self._beams = any(BEAMS in port.get_names() for port in compiled.inputs)
        states = {state.name: state for state in self.request.query_state()}
        if states.keys() != {past + present for past, present in self._pairs.items()}:
            raise BackendFailed("DT504", "the IR must have the cache of the signature as its variables "
                                         f"(got: {', '.join(sorted(states))})"[:2000])  # fmt: skip
        self._states = {past: states[past + present] for past, present in self._pairs.items()}

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """One request from the cache that is fed; nothing of the last one stays."""
        self.request.reset_state()
        for past, state in self._states.items():
            if feeds[past].size:
                state.state = ov.Tensor(np.ascontiguousarray(feeds[past]))
        given = {name: array for name, array in feeds.items() if name not in self._pairs}
        if self._beams:
            given[BEAMS] = np.arange(len(feeds[TOKENS]), dtype=np.int32)
        found = dict(zip((name for name in self.signature.output_names if name not in self._pairs.values()),
                         super().infer(given), strict=True))  # fmt: skip
        found |= {present: self._states[past].state.data for past, present in self._pairs.items()}
        return [found[name] for name in self.signature.output_names]

    def decoder(self, capacity: int) -> KeptCache:
        """Decodes one sequence of up to `capacity` tokens; the cache stays in the engine."""
        return KeptCache(self._compiled, capacity)


BACKEND = OpenVino()

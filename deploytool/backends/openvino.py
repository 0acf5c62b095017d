"""OpenVINO on CPUs: the portable graph as fp32 IR, or quantized by NNCF (openvino_int8.py)."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# OpenVINO's tools and NNCF report their use through this package unless it cannot be imported; both then stay silent.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]

import openvino as ov  # noqa: E402

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends import tables  # noqa: E402
from deploytool.backends.base import Built, Request, portable_of  # noqa: E402
from deploytool.backends.engine import EngineRunner, threads_of  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused, UsageProblem  # noqa: E402
from deploytool.runner import Runner  # noqa: E402
from deploytool.signature import Feeds, Signature  # noqa: E402

ENTRY = "model.xml"
GRAPH = "model.onnx"


@dataclass(frozen=True)
class OpenVino:
    """Builds `model.xml` and `model.bin` from the portable graph; free dimensions stay free."""

    def build(self, request: Request) -> Built:
        """Import the graph, quantize it for int8, and save it without shrinking fp32 weights to fp16."""
        options = tables.OpenVinoBuild(**request.target.build)
        precision = request.target.precision
        if precision not in ("fp32", "int8", "int4"):
            raise UsageProblem("DT202", f"precision must be fp32, int8 or int4 for OpenVINO on CPUs (got {precision})")
        trained = "input_grids" in portable_of(request).settings
        if trained and precision == "int8" and options.scheme == "auto" and not options.weights_only:
            return _build_learned(request)
        path = portable_of(request).main_file
        model = _imported(path)
        settings: dict[str, Any] = {}
        # NNCF imports torch and takes seconds: only builds that quantize need it.
        if precision == "int4" or (precision == "int8" and options.weights_only):
            from deploytool.backends.openvino_weights import compress_weights

            model, settings = compress_weights(model, request, options)
        elif precision == "int8":
            from deploytool.backends.openvino_int8 import quantize

            model, settings = quantize(model, request, options)
        ov.save_model(model, request.out / ENTRY, compress_to_fp16=False)
        return Built("openvino", ENTRY, precision, settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """Compile the IR for the CPU, for the latency of single requests."""
        try:
            compiled = compile_ir(ov.Core().read_model(artifact.main_file), threads_of(artifact))
        except RuntimeError as error:
            raise BackendFailed("DT504", f"OpenVINO must compile {artifact.entry} (got: {error})"[:2000]) from error
        return CompiledRunner(compiled, artifact.signature)


def _build_learned(request: Request) -> Built:
    """The IR of a model that was trained on grids, computed with those."""
    from deploytool.backends.onnx_learned import write_learned

    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        settings = write_learned(portable_of(request), replace(request, out=Path(folder)), "openvino")
        ov.save_model(_imported(Path(folder) / GRAPH), request.out / ENTRY, compress_to_fp16=False)
    return Built("openvino", ENTRY, "int8", settings=settings)


def _imported(path: Path) -> ov.Model:
    try:
        return ov.Core().read_model(path)
    except RuntimeError as error:
        raise InputRefused("DT310", f"OpenVINO must be able to import the graph (got: {error})"[:2000]) from error


def compile_ir(model: ov.Model, threads: int) -> ov.CompiledModel:
    """A model compiled for the CPU in the precision that it is written in; raises RuntimeError."""
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # CPUs with bf16 would compute in it otherwise
    }
    return ov.Core().compile_model(model, "CPU", config)


class CompiledRunner(EngineRunner):
    """Runs a compiled model; inputs and outputs are matched by tensor name."""

    def __init__(self, compiled: ov.CompiledModel, signature: Signature) -> None:
        super().__init__(signature)
        try:
            self.outputs = [compiled.output(name) for name in signature.output_names]
            for name in signature.input_names:
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


BACKEND = OpenVino()

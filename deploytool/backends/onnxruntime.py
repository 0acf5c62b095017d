"""ONNX Runtime on CPUs: the portable graph, a fused decoder (ort_graph.py), dynamic int8 (ort_int8.py), static int8
(onnx_static.py), or weights in 4 or 8 bits (ort_graph.py)."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from deploytool.artifact import MANIFEST, Artifact
from deploytool.backends import ort_generate, sensitivity, tables
from deploytool.backends.base import Built, Request, portable_of
from deploytool.backends.engine import EngineRunner, threads_of
from deploytool.backends.measured import MEASURED, check_processor, opened_with
from deploytool.backends.ort_generate import SharedCache, session_options
from deploytool.backends.ort_rows import run_rows
from deploytool.backends.shipped_runner import ship
from deploytool.decoding import PAST, PRESENT, decodes
from deploytool.errors import BackendFailed, UsageProblem
from deploytool.signature import Feeds, Signature

ENTRY = "model.onnx"
_NO_FP16 = ("GRU", "LSTM", "RNN")  # CPUs have no kernels of these in fp16


@dataclass(frozen=True)
class OnnxRuntime:
    """Builds `model.onnx` from the portable graph."""

    def build(self, request: Request) -> Built:
        """Copy the graph (fp32) or quantize it (int8); whether it opens and is right is for verify to see."""
        options = tables.OnnxRuntimeBuild(**request.target.build)
        portable = portable_of(request)
        if MEASURED in (options.mixed, options.group, options.activations):
            check_processor(request.target)
        settings: dict[str, Any] = {"optimization": options.optimization, "without": list(options.without),
                                    "arena": options.arena, "flush": options.flush}  # fmt: skip
        if grids_of(portable) and options.format == "ort":
            raise UsageProblem("DT202", 'build.format must be "onnx" for a model with learned grids of inputs '
                                        '(got "ort"), whose fusion is chosen when the file is opened')  # fmt: skip
        settings |= _write(portable, request, options)
        if decodes(request.signature) and (request.out / "tokenizer.json").is_file():
            ship(Path(ort_generate.__file__), request.out)
        if options.format == "ort":
            from deploytool.backends import ort_format

            saved = ort_format.write_ort(request.out / ENTRY, options.optimization, settings["without"])
            return Built("onnx", ort_format.ENTRY, request.target.precision, settings={**settings, "saved": saved})
        return Built("onnx", ENTRY, request.target.precision, settings=settings)

    def open(self, artifact: Artifact, profile: str = "") -> SessionRunner:
        """Open the graph with the session settings of the artifact; `profile` as in open_session."""
        level = str(artifact.settings.get("optimization", "all"))
        given = {key: artifact.settings[key] for key in ("fuse_qdq", "spinning", "without", "arena", "flush", "packing")
                 if key in artifact.settings}  # fmt: skip
        session = open_session(artifact.main_file, threads_of(artifact), level, profile=profile, **given)
        return SessionRunner(session, artifact.signature, single_rows=artifact.settings.get("rows") == "single")


class SessionRunner(EngineRunner):
    """Runs an ONNX Runtime session; inputs and outputs are matched by name.

    `single_rows`: the graph takes several rows or several tokens, not both (see ort_attention.py).
    """

    def __init__(self, session: ort.InferenceSession, signature: Signature, *, single_rows: bool = False) -> None:
        super().__init__(signature)
        self.session = session
        self._single_rows = single_rows

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """One call of the session, or one per row."""
        try:
            if self._single_rows:
                return run_rows(self._run, feeds)
            return self._run(dict(feeds))
        except Exception as error:  # the library raises a class of its own per status, without a common base
            raise BackendFailed("DT504", f"ONNX Runtime must run the graph (got: {error})"[:2000],
                                detail=[f"{n}: {list(a.shape)}" for n, a in feeds.items()]) from error  # fmt: skip

    def decoder(self, capacity: int) -> SharedCache | None:
        """Decodes one sequence of up to `capacity` tokens without copies of the cache; None for other models."""
        names = {value.name: value.type for value in self.session.get_inputs()}
        past = [name for name in names if name.startswith(PAST)]
        given = {PRESENT + name.removeprefix(PAST) for name in past} <= set(self.signature.output_names)
        if not decodes(self.signature) or not given or any(names[name] != "tensor(float)" for name in past):
            return None
        return SharedCache(self.session, capacity, self._single_rows)

    def _run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        outputs: list[np.ndarray] = self.session.run(list(self.signature.output_names), feeds)
        return outputs


def _write(portable: Artifact, request: Request, options: tables.OnnxRuntimeBuild) -> dict[str, Any]:
    """Write the graph in the profile's precision; settings of the artifact.

    What rewrites graphs is imported here: it brings the onnx package, which no runner needs in its memory.
    """
    out, precision = request.out / ENTRY, request.target.precision
    learned = grids_of(portable) and precision == "int8" and options.scheme != "weights"
    if learned or (precision, options.scheme) == ("int8", "static"):
        from deploytool.backends.onnx_learned import write_learned
        from deploytool.backends.onnx_qdq import Scheme
        from deploytool.backends.onnx_static import APART, Options, quantize_static

        opened = opened_with(request, options.model_copy(update={"without": (*options.without, *APART)}))
        static = Options(options, options.int8_ops, options.calibration, options.calibration_samples,
                         Scheme(7 if options.reduce_range else 8), opened if options.mixed == MEASURED else None)
        done = write_learned(portable, request, "onnxruntime") if learned else quantize_static(
            portable.main_file, request, static, out)  # fmt: skip
        return {**done, "without": [*options.without, *APART]}
    if precision == "fp32":
        return {**_plain(portable, request.out, options), **grids_of(portable)}
    if precision == "fp16":
        from deploytool.backends.onnx_fp16 import refuse_grids, write_fp16

        refuse_grids(portable, "ONNX Runtime")
        feeds = sensitivity.spread(request.calibration(), options.calibration_samples)
        done = write_fp16(portable.main_file, feeds, (*options.fp32_ops, *_NO_FP16), out)
        # What "all" adds, layouts, ends the process by a signal at some fp16 graphs.
        return {**done, "optimization": "extended"} if options.optimization == "all" else done
    if (precision, options.scheme) == ("int8", "dynamic"):
        from deploytool.backends.ort_int8 import quantize

        return quantize(portable.main_file, request, options, out)
    from deploytool.backends.ort_graph import write_weight_only  # int8 or int4 of the weights alone

    return write_weight_only(portable, request, options)


def _plain(portable: Artifact, out: Path, options: tables.OnnxRuntimeBuild) -> dict[str, object]:
    """The fused graph of a language model, else a copy."""
    if options.fuse and decodes(portable.signature):
        from deploytool.backends.ort_graph import write_plain

        fused = write_plain(portable, out)
        if fused is not None:
            return fused
    copy_graph(portable, out)
    return {}


def open_session(
    model: Path | bytes, threads: int, optimization: str = "all", *, fuse_qdq: bool = True, spinning: bool = True,
    without: Sequence[str] = (), arena: bool = True, flush: bool = False, packing: bool = True, profile: str = "",
) -> ort.InferenceSession:  # fmt: skip
    """A session on the CPU of a file or a serialized graph; raises BackendFailed with the library's text.

    Without `fuse_qdq`, QuantizeLinear and DequantizeLinear run as they are written, all between them in floating point.

    The settings are those of the same names in `tables.OnnxRuntimeBuild` and of `[runtime]`; `packing` lays weights out
    anew for its kernels, which costs time and a second copy of them. With `profile`, the start of a file's name, the
    session writes down there what it runs.
    """
    options = session_options({"threads": threads, "optimization": optimization, "fuse_qdq": fuse_qdq,
                               "spinning": spinning, "arena": arena, "flush": flush, "packing": packing})  # fmt: skip
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = profile
    try:
        content = str(model) if isinstance(model, Path) else model
        return ort.InferenceSession(content, options, providers=["CPUExecutionProvider"],
                                    disabled_optimizers=list(without))  # fmt: skip
    except Exception as error:  # see SessionRunner.infer
        name = model.name if isinstance(model, Path) else "the graph"
        raise BackendFailed("DT504", f"ONNX Runtime must open {name} (got: {error})"[:2000]) from error


def grids_of(portable: Artifact) -> dict[str, object]:
    """What a graph whose inputs of layers lie on learned grids is opened with; nothing for other graphs."""
    return {key: portable.settings[key] for key in ("input_grids", "fuse_qdq") if key in portable.settings}


def copy_graph(portable: Artifact, out: Path) -> None:
    """Copy the graph and its external data; plain copies, since ONNX Runtime follows hard links out of the folder."""
    for entry in portable.files:
        if entry.path != MANIFEST and "/" not in entry.path:
            shutil.copyfile(portable.folder / entry.path, out / entry.path)


BACKEND = OnnxRuntime()

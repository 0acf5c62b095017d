"""TensorRT engines for NVIDIA GPUs, from the portable graph in the profile's precision: see tensorrt_graph.py.

Full TensorRT builds only beside a GPU and for it; TensorRT-RTX also builds without one, for the compute capabilities
that the profile names. Where the engine does not open here (no GPU, or another one than it is for), the artifact opens
the very graph that the compiler was given, on ONNX Runtime, or the one that stands in for it, and its settings say why.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploytool.artifact import Artifact
from deploytool.backends import tables, tensorrt_caches, tensorrt_layers
from deploytool.backends.base import Built, Request, importable, nvidia_driver, portable_of
from deploytool.backends.engine import threads_of
from deploytool.backends.onnx_fp16 import rounding_session
from deploytool.backends.onnxruntime import SessionRunner, open_session
from deploytool.backends.tensorrt_graph import GRAPH, PARITY, write_graph
from deploytool.backends.tensorrt_refusals import Refusal, not_built, refused
from deploytool.errors import DeployError, InputRefused, UsageProblem, nearest
from deploytool.runner import Runner
from deploytool.signature import Outputs, Signature
from deploytool.target import Target

ENGINE = "model.engine"


def _library() -> Any:
    full = nvidia_driver() and importable("tensorrt")
    return importlib.import_module("tensorrt" if full else "tensorrt_rtx")


if TYPE_CHECKING:
    import tensorrt as trt  # both have the calls that are made here

    from deploytool.backends.tensorrt_engine import CudaRunner
else:
    trt = _library()


class Log(trt.ILogger):
    """Keeps TensorRT's errors, which are the only place where a failure is explained."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.lines: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        """Called by TensorRT."""
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.lines.append(message[:500])


@dataclass(frozen=True)
class TensorRt:
    """Builds `model.engine` beside the graph that it was built from."""

    def build(self, request: Request) -> Built:
        """Convert the graph, choose the optimization profile, compile."""
        options = tables.TensorRtBuild(**request.target.build)
        precision = request.target.precision
        settings: dict[str, Any] = {"engine": ENGINE, "graph": GRAPH, "builder": f"{trt.__name__} {trt.__version__}"}
        settings |= write_graph(portable_of(request), request, options)
        ranges = size_ranges(request, options)
        plan = compile_engine(request.out / GRAPH, request.signature, ranges, request.target)
        (request.out / ENGINE).write_bytes(plan)
        settings["profile"] = {name: size.model_dump() for name, size in ranges.items()}
        settings["rebuild"] = rebuild_command(request.signature, ranges)
        obstacle, inspected = tried_here(plan, request.signature)
        settings["inspector"] = tensorrt_layers.sentence(inspected)
        if obstacle:
            entry = PARITY if "parity_graph" in settings else GRAPH
            return Built("tensorrt", entry, precision, executes=False, settings={**settings, "not_executed": obstacle})
        settings["engine_layers"] = inspected
        return Built("tensorrt", ENGINE, precision, settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """The engine where it opened when it was built; else its graph on ONNX Runtime."""
        if not artifact.executes:
            return SessionRunner(_open_graph(artifact), artifact.signature)
        return _open_plan(artifact.main_file.read_bytes(), artifact.signature)


def _open_graph(artifact: Artifact) -> Any:
    """What stands in for the engine: nothing between Q/DQ pairs is fused, so that products run on what grids hold."""
    if artifact.precision == "fp16":
        return rounding_session(artifact.main_file, threads_of(artifact))
    return open_session(artifact.main_file, threads_of(artifact), fuse_qdq=artifact.precision in ("fp32", "bf16"),
                        without=artifact.settings.get("without", ()))  # fmt: skip


def _open_plan(plan: bytes, signature: Signature) -> CudaRunner:
    # Needs torch with CUDA: only opening an engine does.
    from deploytool.backends.tensorrt_engine import open_engine

    return open_engine(trt, Log(), plan, signature)


def tried_here(plan: bytes, signature: Signature) -> tuple[str, dict[str, Any] | None]:
    """Why a serialized engine cannot run on this machine, found by opening it, "" when nothing is in the way; and what
    its inspector tells of an engine that opens."""
    if not nvidia_driver():
        return "no NVIDIA driver here", None
    try:
        with _open_plan(plan, signature) as runner:
            return "", runner.layers()
    except ImportError as error:
        return f"torch, which holds the engine's buffers, cannot be imported ({error})", None
    except DeployError as error:
        return "; ".join([error.message, *error.detail]), None


def size_ranges(request: Request, options: tables.TensorRtBuild) -> dict[str, tables.SizeRange]:
    """Sizes of every free dimension that the engine takes.

    Smallest and largest of the calibration feeds and the parity cases, tuned for the first case, or what the profile
    says. Raises UsageProblem for a profile that leaves a parity case outside: parity would pass on the graph at a size
    that the engine refuses.
    """
    unknown = [name for name in options.profile if name not in request.signature.free]
    if unknown:
        raise UsageProblem("DT202", f"build.profile must name free dimensions (got {', '.join(unknown)})",
                           detail=[nearest(name, request.signature.free) for name in unknown])  # fmt: skip
    tested = _sizes(request.signature, request.cases())
    seen = _sizes(request.signature, request.calibration())
    if not all(tested.values()):
        raise InputRefused("DT303", "free dimensions must have sizes in at least one case (got no cases)")
    _check_profile(options.profile, tested)
    return {name: options.profile.get(name)
            or tables.SizeRange(min=min(sizes + seen[name]), opt=sizes[0], max=max(sizes + seen[name]))
            for name, sizes in tested.items()}  # fmt: skip


def _sizes(signature: Signature, many: Iterable[Outputs]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {name: [] for name in signature.free}
    for feeds in many if found else ():
        for name, size in signature.bind(feeds).items():
            found[name].append(size)
    return found


def _check_profile(profile: Mapping[str, tables.SizeRange], tested: Mapping[str, list[int]]) -> None:
    outside = [
        f"{name}: {wanted.min} to {wanted.max} leaves out {', '.join(map(str, sorted(left_out)))}"
        for name, wanted in profile.items()
        if (left_out := {size for size in tested[name] if not wanted.min <= size <= wanted.max})
    ]
    if outside:
        raise UsageProblem("DT202", "build.profile must hold the sizes of every case that parity is taken on "
                                    f"(got {'; '.join(outside)})",
                           fix="widen these ranges, or give samples of the sizes that the engine is for")  # fmt: skip


def compile_engine(graph: Path, signature: Signature, ranges: dict[str, tables.SizeRange], target: Target) -> bytes:
    """The serialized engine; InputRefused names operators that TensorRT does not take, BackendFailed its own log."""
    log = Log()
    builder = trt.Builder(log)
    strong = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strong is None else 1 << int(strong))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise refused([Refusal(e.node_operator(), e.node_name(), e.desc()) for e in errors])
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # what the inspector can tell
    _set_devices(config, target)
    if ranges:
        config.add_optimization_profile(_profile(builder, signature, ranges))
    timings = tensorrt_caches.timings(trt, config)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise not_built(log.lines)
    if timings:
        timings.keep()
    return bytes(plan)


def _set_devices(config: Any, target: Target) -> None:
    """Only TensorRT-RTX builds for other GPUs than the one that is there."""
    names = target.device.compute_capabilities
    if not names or not hasattr(config, "set_compute_capability"):
        return
    rtx: Any = trt  # TensorRT-RTX alone has these
    known = [name for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UsageProblem("DT202", f"device.compute_capabilities must be among {', '.join(known)} "
                                    f"(got {', '.join(unknown)})")  # fmt: skip
    config.num_compute_capabilities = len(names)
    for index, name in enumerate(names):
        config.set_compute_capability(rtx.ComputeCapability.__members__[name], index)


def _profile(builder: Any, signature: Signature, ranges: dict[str, tables.SizeRange]) -> Any:
    profile = builder.create_optimization_profile()
    for spec in signature.inputs:
        if any(isinstance(dim, str) for dim in spec.shape):
            profile.set_shape(spec.name, *(_shape(spec.shape, ranges, which) for which in ("min", "opt", "max")))
    return profile


def _shape(dims: tuple[int | str, ...], ranges: dict[str, tables.SizeRange], which: str) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else int(getattr(ranges[dim], which)) for dim in dims)


def rebuild_command(signature: Signature, ranges: dict[str, tables.SizeRange]) -> str:
    """The command of NVIDIA's own tool that builds the engine again, on the machine where it shall run."""
    parts = ["trtexec", f"--onnx={GRAPH}", f"--saveEngine={ENGINE}", "--stronglyTyped"]
    for which in ("min", "opt", "max") if ranges else ():
        shapes = (f"{spec.name}:{'x'.join(map(str, _shape(spec.shape, ranges, which)))}" for spec in signature.inputs)
        parts.append(f"--{which}Shapes={','.join(shapes)}")
    return " ".join(parts)


BACKEND = TensorRt()

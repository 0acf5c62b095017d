"""What a backend is: a file in this folder with a `BACKEND` that builds artifacts and opens them.

Adding one: a file here with `BACKEND`, its line in `BACKENDS` below, a profile in targets/, a line of extras in
pyproject.toml. `BACKENDS` is what can be known of a backend without importing its library: the file `name.py` is
imported when the backend `name` first builds or opens something.
"""

from __future__ import annotations

import ctypes.util
import importlib
import importlib.util
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from deploytool import settings, shipped
from deploytool.artifact import Artifact, Step, versions
from deploytool.backends import tables
from deploytool.backends.tensorrt_devices import check_devices
from deploytool.backends.used_settings import check_used
from deploytool.errors import EnvironmentLacking, InternalError, UsageProblem, nearest
from deploytool.runner import Runner
from deploytool.settings import Table
from deploytool.signature import Outputs, Signature
from deploytool.source import ModelRef, Source
from deploytool.storage import syncing
from deploytool.target import Target, load_target, target_names

AS_USED = "as_used"  # a setting of the eager module: see `open_as_used`


@dataclass(frozen=True)
class Probe:
    """What a backend says of this machine.

    available   it can build here
    executes    what it builds can run here
    reason      why not, one sentence
    fix         the command that would change it
    """

    available: bool
    executes: bool = True
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Request:
    """One thing to build.

    source       the live module, for backends that accept "source"; else None
    portable     the ONNX lowering, for backends that accept "onnx"; else None
    calibration  re-iterable real feeds, NumPy
    cases        re-iterable inputs that parity is taken on; the first is the one that is timed
    encodings    the file of the quantized constants of `portable`, for `encoding.read_coded`; None without any
    out          an existing, empty folder to write to
    ref          what the user named, for the model's own evaluate(); None where that is not asked for
    references   what the model gives for each of `cases`, in their order; none where that was not recorded
    kept         folder in which what was measured here stays as long as the prepared model; None: nothing stays
    """

    target: Target
    signature: Signature
    source: Source | None
    portable: Artifact | None
    calibration: Callable[[], Iterable[Outputs]]
    cases: Callable[[], Iterable[Outputs]]
    out: Path
    seed: int = 0
    encodings: Path | None = None
    ref: ModelRef | None = None
    references: Callable[[], Iterable[Outputs]] = tuple
    kept: Path | None = None


@dataclass(frozen=True)
class Built:
    """What a backend wrote into `Request.out`: see the fields of the same names in Artifact."""

    format: str
    entry: str
    precision: str
    executes: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """What the file of a backend holds as `BACKEND`: the two verbs, with the heavy library at the file's top."""

    def build(self, request: Request) -> Built:
        """Write the engine into `request.out`."""
        ...

    def open(self, artifact: Artifact) -> Runner:
        """Open the engine of an artifact for running here."""
        ...


@dataclass(frozen=True)
class Backend:
    """A backend as seen from outside: known without importing it; `build` and `open` import its file.

    accepts    "source" (the live module) or "onnx" (the portable graph)
    packages   names of the Python distributions that it uses, for versions and doctor
    modules    import names that must be there; "a|b" when either will do
    extra      the extra of pyproject.toml that installs them
    table      what the profile's `[build]` may hold
    driver     import-free check that built engines can run here: "" for CPUs, "nvidia" for a GPU's driver
    compiler   whether building needs a C++ compiler: the one that CXX names, else g++
    devices    raises UsageProblem where the profile's device cannot have its precision
    """

    name: str
    accepts: Literal["source", "onnx"]
    packages: tuple[str, ...]
    modules: tuple[str, ...]
    extra: str
    table: type[Table]
    driver: Literal["", "nvidia"] = ""
    compiler: bool = False
    devices: Callable[[Target], None] = lambda target: None

    @property
    def fix(self) -> str:
        """The command that installs what the backend needs."""
        return f"pip install 'deploytool[{self.extra}]'"

    def probe(self, target: Target) -> Probe:
        """Whether `target` can be built and run here; never raises, imports nothing heavy."""
        absent = [name for name in self.modules if not any(importable(part) for part in name.split("|"))]
        if absent:
            packages = ", ".join(name.partition(".")[0] for name in absent).replace("|", " or ")
            return Probe(False, False, f"not installed: {packages}", self.fix)
        compiler = os.environ.get("CXX") or "g++"
        if self.compiler and shutil.which(compiler) is None:
            return Probe(False, False, f"no C++ compiler here: {compiler} is not found", "apt-get install g++")
        if self.driver == "nvidia" and not nvidia_driver():
            if not importable("tensorrt_rtx"):
                return Probe(False, False, "no NVIDIA driver here, and TensorRT builds only beside a GPU", self.fix)
            return Probe(True, False, "no NVIDIA driver here: engines are built, but run elsewhere",
                         "run it on a machine with an NVIDIA GPU and driver")  # fmt: skip
        return Probe(True)

    def check(self, target: Target, path: Path | None = None) -> None:
        """Raise UsageProblem unless the profile fits this backend; `path` is its file, for line numbers."""
        text, where = path.read_text(encoding="utf-8") if path else "", str(path or f"target {target.name!r}")
        options = settings.check_table(dict(target.build), self.table, text=text, where=where, prefix=("build",))
        check_used(target, options, text=text, where=where)
        self.devices(target)

    def build(self, request: Request) -> Built:
        """Write the engine into `request.out`; raises EnvironmentLacking when a package is missing."""
        self.check(request.target)
        return self._engine().build(request)

    def open(self, artifact: Artifact) -> Runner:
        """Open the engine of an artifact; raises EnvironmentLacking when a package is missing."""
        return self._engine().open(artifact)

    def _engine(self) -> Engine:
        try:
            engine: Engine = importlib.import_module(f"deploytool.backends.{self.name}").BACKEND
        except ImportError as error:
            raise EnvironmentLacking(
                "DT401", f"backend {self.name!r} must be able to import {', '.join(self.modules)} (got: {error})",
                fix=self.fix,
            ) from error  # fmt: skip
        return engine


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("eager", "source", ("torch",), ("torch",), "torch", tables.NoSettings),
        Backend("torchscript", "source", ("torch",), ("torch",), "torch", tables.TorchScriptBuild),
        Backend("inductor", "source", ("torch",), ("torch",), "torch", tables.InductorBuild, compiler=True),
        Backend("inductor_int8", "source", ("torch", "torchao"), ("torch", "torchao"), "inductor",
                tables.InductorInt8Build, compiler=True),
        Backend("fbgemm", "source", ("torch",), ("torch",), "torch", tables.FbgemmBuild),
        Backend("executorch", "source", ("executorch", "torchao", "torch"),
                ("executorch.extension.pybindings._C", "torchao"), "executorch", tables.ExecuTorchBuild),
        Backend("onnxruntime", "onnx", ("onnxruntime", "onnx"), ("onnxruntime", "onnx"), "onnx",
                tables.OnnxRuntimeBuild),
        Backend("openvino", "onnx", ("openvino", "nncf", "onnx"), ("openvino", "nncf"), "openvino",
                tables.OpenVinoBuild),
        Backend("tensorrt", "onnx", ("tensorrt", "tensorrt-rtx-cu13", "onnxruntime", "onnx"),
                ("tensorrt|tensorrt_rtx", "onnxruntime", "onnx"), "tensorrt", tables.TensorRtBuild, driver="nvidia",
                devices=check_devices),
    )
}  # fmt: skip


def backend_names() -> list[str]:
    """Names of the backends, sorted."""
    return sorted(BACKENDS)


def find_backend(name: str) -> Backend:
    """The backend of a name; nothing heavy is imported."""
    if name not in BACKENDS:
        raise UsageProblem("DT201", f"the backend must be a known one (got {name!r})",
                           detail=[nearest(name, BACKENDS)])  # fmt: skip
    return BACKENDS[name]


def _unknown_names(data: Mapping[str, Any], text: str, path: Path) -> list[str]:
    """Of what a profile names: a backend or a target that there is not, with its line."""
    named = [(key, known, data[key]) for key, known in (("backend", backend_names()), ("plain", target_names()))
             if isinstance(data.get(key), str)]  # fmt: skip
    unknown = [(key, known, value) for key, known, value in named if value not in known
               and (key == "backend" or shipped.find("targets", value, ".toml") is None)]  # fmt: skip
    return [f"{path}:{settings.line_of(text, (key,))}: {key} must be a known one (got {value!r}); "
            f"{nearest(value, known)}" for key, known, value in unknown]  # fmt: skip


def load_checked_target(name: str) -> Target:
    """`load_target`, and its backend and `[build]` table checked too: all problems at once, with file and line."""
    path = shipped.find("targets", name, ".toml")
    if path is None:
        return load_target(name)  # which says so
    data, text = settings.read_toml(path)
    problems: list[str] = []
    target = settings.collect(problems, lambda: load_target(name))
    problems += _unknown_names(data, text, path)
    backend = BACKENDS.get(str(data.get("backend")))
    build = data.get("build", {})
    if backend is not None and isinstance(build, dict):
        table, profile = backend.table, target
        options = settings.collect(problems, lambda: settings.check_table(build, table, text=text, where=str(path),
                                                                          prefix=("build",)))  # fmt: skip
        if profile is not None and options is not None:
            settings.collect(problems, lambda: check_used(profile, options, text=text, where=str(path)))
    if problems or target is None:
        raise settings.complain(str(path), problems)
    if backend is not None:
        backend.devices(target)
    return target


def portable_of(request: Request) -> Artifact:
    """The ONNX lowering that a request must bring."""
    if request.portable is None:
        raise InternalError("DT900", f"target {request.target.name!r} must be built from ONNX (got none)")
    return request.portable


def source_of(request: Request) -> Source:
    """The live module that a request must bring."""
    if request.source is None:
        raise InternalError("DT900", f"target {request.target.name!r} must be built from a live module (got none)")
    return request.source


def open_artifact(artifact: Artifact) -> Runner:
    """Open an artifact with the backend that its manifest names."""
    return find_backend(artifact.backend).open(artifact)


def open_as_used(artifact: Artifact) -> Runner:
    """Open an artifact for timing or the task metric, as its users run it.

    Only the eager module knows a difference: torch takes its fast path by itself, which gives other outputs where a
    padding mask hides tokens, so that parity is taken without it.
    """
    used = {AS_USED: True} if artifact.backend == "eager" else {}
    return open_artifact(replace(artifact, settings={**artifact.settings, **used}))


def build_artifact(request: Request, model: Mapping[str, Any], history: tuple[Step, ...] = ()) -> Artifact:
    """Build, check what the backend promises, and write the manifest."""
    backend = find_backend(request.target.backend)
    started = time.perf_counter()
    built = backend.build(request)
    seconds = time.perf_counter() - started
    if not (request.out / built.entry).is_file():
        raise InternalError("DT900", f"backend {request.target.backend!r} must write {built.entry} (it is not there)")
    target, grids = _beside_grids(request, built)
    step = Step("build", dict(request.target.build), versions(backend.packages), seconds)
    artifact = Artifact(
        folder=request.out,
        backend=request.target.backend,
        format=built.format,
        entry=built.entry,
        precision=built.precision,
        executes=built.executes,
        signature=request.signature,
        target=target.to_json(),
        model=model,
        settings={**request.target.runtime.model_dump(mode="json"), **built.settings, **grids},
        history=(*history, step),
    )
    with syncing(request.out):  # both read what was just written, one to hash and one to keep it
        return artifact.save()


def _beside_grids(request: Request, built: Built) -> tuple[Target, dict[str, Any]]:
    """The profile with the limits that an engine in floating point can keep to, where the model has learned grids.

    TorchScript runs torch's own kernels; in any other engine a number between two codes may fall to either.
    """
    count = request.portable.settings.get("input_grids") if request.portable is not None else None
    if not count or built.precision != "fp32":
        return request.target, {}
    eased = request.target.model_copy(update={"parity": request.target.parity.beside_grids()})
    return eased, {"input_grids": count}


def importable(name: str) -> bool:
    """Whether there is a module of this name, found without importing it; folders that hold types alone are none."""
    try:
        spec = importlib.util.find_spec(name)
        return spec is not None and spec.origin is not None
    except (ImportError, ValueError):  # an import hook that refuses it; a module without a spec in its place
        return False


def nvidia_driver() -> bool:
    """Whether an NVIDIA driver is installed here."""
    return Path("/proc/driver/nvidia/version").exists() or ctypes.util.find_library("cuda") is not None

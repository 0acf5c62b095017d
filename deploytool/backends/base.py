"""What a backend is: a file in this folder with a `BACKEND` that builds artifacts and opens them.

Adding one: a file here with `BACKEND`, a profile in targets/, a line of extras in pyproject.toml. The folder is the
registry: the file `name.py` is the backend `name`, imported when asked for.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from deploytool.artifact import Artifact, Step
from deploytool.errors import InternalError, UsageProblem, nearest
from deploytool.runner import Runner
from deploytool.signature import Outputs, Signature
from deploytool.source import Source
from deploytool.target import Target


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
    out          an existing, empty folder to write to
    """

    target: Target
    signature: Signature
    source: Source | None
    portable: Artifact | None
    calibration: Callable[[], Iterable[Outputs]]
    out: Path
    seed: int = 0


@dataclass(frozen=True)
class Built:
    """What a backend wrote into `Request.out`: see the fields of the same names in Artifact."""

    format: str
    entry: str
    precision: str
    executes: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)


class Backend(Protocol):
    """The two verbs, and what they need.

    accepts    "source" (the live module) or "onnx" (the portable graph)
    packages   names of the Python distributions that it uses, for versions and doctor
    extra      the extra of pyproject.toml that installs them ("" for the core)
    """

    accepts: Literal["source", "onnx"]
    packages: tuple[str, ...]
    extra: str

    def probe(self, target: Target) -> Probe:
        """Whether `target` can be built and run here; never raises, imports nothing heavy."""
        ...

    def build(self, request: Request) -> Built:
        """Write the engine into `request.out`."""
        ...

    def open(self, artifact: Artifact) -> Runner:
        """Open the engine of an artifact for running here."""
        ...


def backend_names() -> list[str]:
    """Names of the backends: the files of this folder."""
    return sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__init__", "base"))


def find_backend(name: str) -> Backend:
    """Import a backend by name."""
    if name not in backend_names():
        raise UsageProblem("DT201", f"the backend must be a known one (got {name!r})",
                           detail=[nearest(name, backend_names())])  # fmt: skip
    backend: Backend = importlib.import_module(f"deploytool.backends.{name}").BACKEND
    return backend


def open_artifact(artifact: Artifact) -> Runner:
    """Open an artifact with the backend that its manifest names."""
    return find_backend(artifact.backend).open(artifact)


def build_artifact(request: Request, model: Mapping[str, Any], history: tuple[Step, ...] = ()) -> Artifact:
    """Build, check what the backend promises, and write the manifest."""
    backend = find_backend(request.target.backend)
    started = time.perf_counter()
    built = backend.build(request)
    seconds = time.perf_counter() - started
    if not (request.out / built.entry).is_file():
        raise InternalError("DT900", f"backend {request.target.backend!r} must write {built.entry} (it is not there)")
    step = Step("build", dict(request.target.build), versions(backend.packages), seconds)
    return Artifact(
        folder=request.out,
        backend=request.target.backend,
        format=built.format,
        entry=built.entry,
        precision=built.precision,
        executes=built.executes,
        signature=request.signature,
        target=request.target.to_json(),
        model=model,
        settings={"threads": request.target.runtime.threads, **built.settings},
        history=(*history, step),
    ).save()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of distributions; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def missing(packages: Iterable[str]) -> list[str]:
    """The distributions among `packages` that are not installed here."""
    names = list(packages)
    found = versions(names)
    return [name for name in names if name not in found]

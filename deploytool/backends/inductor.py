"""AOTInductor: the module exported by torch.export and compiled to one shared library with its weights, `model.pt2`.

It is what torch recommends in TorchScript's place. Compiling needs a C++ compiler; running needs torch alone, and a CPU
with the instructions that it was compiled for.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.export import Dim, ExportedProgram

from deploytool.artifact import Artifact
from deploytool.backends import tables
from deploytool.backends.base import Built, Request, source_of
from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.engine import EngineRunner, threads_of
from deploytool.backends.torchscript import example
from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.runner import Runner
from deploytool.signature import Feeds, Signature
from deploytool.source import Source

ENTRY = "model.pt2"
_AVX2 = {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
# What Inductor calls vector instructions, and the flag of /proc/cpuinfo.
_FLAGS = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}


@dataclass(frozen=True)
class Inductor:
    """Builds `model.pt2` from a live module."""

    def build(self, request: Request) -> Built:
        """Export with the signature's free dimensions, compile, package."""
        options = tables.InductorBuild(**request.target.build)
        program = exported(source_of(request), example(request))
        path = request.out / ENTRY
        compile_package(program, path, _AVX2 if options.cpu == "avx2" else {})
        package = load_package(path)
        metadata = dict(package.get_metadata())
        return Built("pt2", ENTRY, "fp32", settings={"cpu": str(metadata.get("AOTI_CPU_ISA", ""))})

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt2`; raises EnvironmentLacking where this CPU lacks what it was compiled for."""
        lacking = missing_instructions(str(artifact.settings.get("cpu", "")))
        if lacking:
            raise EnvironmentLacking("DT402", f"the CPU must have {', '.join(lacking)}, which {artifact.entry} was "
                                     "compiled for (it does not)",
                                     fix='build it with cpu = "avx2" in [build], or on this machine')  # fmt: skip
        torch.set_num_threads(threads_of(artifact))
        return PackageRunner(load_package(artifact.main_file), artifact.signature)


class PackageRunner(EngineRunner):
    """Runs a loaded package: positional tensors in the order of the signature."""

    def __init__(self, package: Any, signature: Signature) -> None:
        super().__init__(signature)
        self.package = package

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """One call of the compiled library."""
        try:
            with torch.inference_mode():
                outputs = self.package(*positional(self.signature, feeds))
        except RuntimeError as error:
            raise BackendFailed("DT504", f"the package must run on feeds that fit its signature (got: {error})"[:2000],
                                detail=[f"{n}: {list(a.shape)}" for n, a in feeds.items()]) from error  # fmt: skip
        return [tensor.numpy() for tensor in as_tuple(outputs)]

    def close(self) -> None:
        """Free the library, and with it the folder that it was unpacked to."""
        del self.package


def exported(source: Source, arguments: tuple[Tensor, ...]) -> ExportedProgram:
    """The module as an exported program, every free dimension free; raises InputRefused where torch fixes one."""
    free = tuple({axis: Dim.DYNAMIC for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
                 for spec in source.signature.inputs)  # fmt: skip
    try:
        with torch.no_grad(), no_fast_path(), _quiet():
            return torch.export.export(source.flat, arguments, dynamic_shapes=(free,), strict=False)
    except Exception as error:  # what export raises has no common base, and the module's own code runs in it
        raise InputRefused("DT310", "torch.export must take the model with its free dimensions "
                                    f"(got {type(error).__name__}: {error})"[:2000],
                           fix="choose torchscript, or a target that lowers to ONNX; recurrent layers over a free "
                               "number of steps cannot be exported") from error  # fmt: skip


def compile_package(program: ExportedProgram, path: Path, settings: dict[str, Any]) -> None:
    """Compile for CPUs and write the package; nothing else is left on the disk. Raises BackendFailed."""
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder, _cache(folder), _quiet():
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path),
                # Constants are folded and laid out for the kernels; threads are counted when it runs.
                inductor_configs={"freezing": True, "cpp.dynamic_threads": True, **settings},
            )  # fmt: skip
        except (RuntimeError, InductorError, OSError) as error:
            raise BackendFailed("DT504", f"AOTInductor must compile the model (got: {error})"[:2000],
                                fix="choose torchscript; the compiler's words are in the log") from error  # fmt: skip


def load_package(path: Path) -> Any:
    """The package, loaded; raises BackendFailed."""
    try:
        with _quiet():
            return torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        raise BackendFailed("DT504", f"torch must load {path.name} (got: {error})"[:2000]) from error


def missing_instructions(wanted: str) -> list[str]:
    """Flags that this CPU lacks of what Inductor names, such as "AVX512 AVX512_VNNI"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    has = {flag for line in lines if line.startswith("flags") for flag in line.split()}
    return [_FLAGS[name] for name in wanted.split() if name in _FLAGS and _FLAGS[name] not in has]


@contextmanager
def _cache(folder: str) -> Iterator[None]:
    """What Inductor compiles goes into this folder."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
    try:
        yield
    finally:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
        if before is not None:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings of its own parts about each other; parity judges the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


BACKEND = Inductor()

"""AOTInductor: the module exported by torch.export and compiled to one shared library with its weights, `model.pt2`.

It is what torch recommends in TorchScript's place. Compiling needs a C++ compiler; running needs torch alone, and a CPU
with the instructions that it was compiled for.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._inductor.exc import InductorError
from torch.export import ExportedProgram
from torch.fx import Graph

from deploytool.artifact import KEPT, Artifact
from deploytool.backends import saturation, tables
from deploytool.backends.base import Built, Request, source_of
from deploytool.backends.eager import as_tuple, positional
from deploytool.backends.engine import EngineRunner, threads_of
from deploytool.backends.exported import export_module, quiet
from deploytool.backends.inductor_kernels import Recorder
from deploytool.backends.ran_inductor import KERNELS
from deploytool.backends.torchscript_make import example
from deploytool.errors import BackendFailed, EnvironmentLacking
from deploytool.processor import processor
from deploytool.runner import Runner
from deploytool.signature import Feeds, Signature
from deploytool.source import Source
from deploytool.storage import sha256_file, write_json

ENTRY = "model.pt2"
PROGRAM = "program.pt2"
AVX2 = {"cpp.simdlen": 256, "cpp.march": "x86-64-v3"}
# What Inductor calls vector instructions, and the flag of /proc/cpuinfo.
_FLAGS = {"AVX2": "avx2", "AVX512": "avx512f", "AVX512_VNNI": "avx512_vnni", "AMX_TILE": "amx_tile"}


@dataclass(frozen=True)
class Inductor:
    """Builds `model.pt2` from a live module."""

    def build(self, request: Request) -> Built:
        """Export with the signature's free dimensions, compile, package."""
        options = tables.InductorBuild(**request.target.build)
        program = exported(source_of(request), example(request))
        write_package(program, request, options.cpu)
        settings = {"cpu": instructions(request.out / ENTRY), **keep_program(program, request, options)}
        return Built("pt2", ENTRY, "fp32", settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt2`; see open_package."""
        return open_package(artifact)


def open_package(artifact: Artifact) -> Runner:
    """Load `model.pt2`; raises EnvironmentLacking where this CPU lacks what it was compiled for."""
    lacking = missing_instructions(str(artifact.settings.get("cpu", "")))
    if lacking:
        raise EnvironmentLacking("DT402", f"the CPU must have {', '.join(lacking)}, which {artifact.entry} was "
                                 "compiled for (it does not)",
                                 fix='build it with cpu = "avx2" in [build], or on this machine')  # fmt: skip
    _check_saturation(artifact)
    torch.set_num_threads(threads_of(artifact))
    return PackageRunner(load_package(artifact.main_file), artifact.signature)


def _check_saturation(artifact: Artifact) -> None:
    """Raise EnvironmentLacking where sums of the package's 8-bit weights would be cut off: by CPUs without VNNI."""
    found = artifact.settings.get("needs_vnni", {"weights": 0})
    if found["weights"] and not saturation.has_vnni(processor().flags):
        raise EnvironmentLacking("DT402", f"the CPU must have VNNI: {found['weights']} of {found['of']} int8 weights "
                                 f"of {artifact.entry} saturate without (it has none)",
                                 fix="build it with weight_bits = 7; train on grids of 7 bits")  # fmt: skip


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
    return export_module(source.flat, source.signature, arguments)


def write_package(program: ExportedProgram, request: Request, cpu: str) -> dict[str, Any]:
    """Compile a program to `model.pt2` and tell of its kernels, here and in a file beside it; see Recorder.told."""
    recorder, path = Recorder(request.signature), request.out / ENTRY

    def see(graph: Graph) -> None:  # Inductor copies its settings, and a recorder in them; a function stays itself
        recorder.see(graph)

    compile_package(program, path, {**(AVX2 if cpu == "avx2" else {}), "post_grad_custom_pre_pass": see})
    told = recorder.told(path)
    write_json(request.out / KERNELS, told)
    return told


def keep_program(program: ExportedProgram, request: Request, options: tables.InductorBuild) -> dict[str, Any]:
    """Leave what was compiled beside the package, for a search for wrong nodes; the settings that tell of it."""
    if not options.keep_program:
        return {}
    path = request.out / KEPT / PROGRAM
    path.parent.mkdir()
    with quiet():
        torch.export.save(program, path)
    return {"program": sha256_file(path)}


def instructions(package: Path) -> str:
    """The instructions that a package was compiled for, as Inductor names them."""
    return str(dict(load_package(package).get_metadata()).get("AOTI_CPU_ISA", ""))


def compile_package(program: ExportedProgram, path: Path, settings: dict[str, Any]) -> None:
    """Compile for CPUs and write the package; nothing else is left on the disk. Raises BackendFailed."""
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder, _cache(folder), quiet(), torch.no_grad():
        try:
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path),
                # Constants are folded and laid out for the kernels, which torch does without gradients alone; threads
                # are counted when it runs.
                inductor_configs={"freezing": True, "cpp.dynamic_threads": True, **settings},
            )  # fmt: skip
        except (RuntimeError, InductorError, OSError) as error:
            raise BackendFailed("DT504", f"AOTInductor must compile the model (got: {error})"[:2000],
                                fix="choose torchscript; the compiler's words are in the log") from error  # fmt: skip


def load_package(path: Path) -> Any:
    """The package, loaded; raises BackendFailed."""
    try:
        with quiet():
            return torch._inductor.aoti_load_package(str(path))
    except (RuntimeError, OSError) as error:
        raise BackendFailed("DT504", f"torch must load {path.name} (got: {error})"[:2000]) from error


def missing_instructions(wanted: str) -> list[str]:
    """Flags that this CPU lacks of what Inductor names, such as "AVX512 AVX512_VNNI"."""
    has = processor().flags
    return [_FLAGS[name] for name in wanted.split() if has and name in _FLAGS and _FLAGS[name] not in has]


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


BACKEND = Inductor()

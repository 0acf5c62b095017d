"""What an export or a compression needs at the least, told before work starts: from the size of the weights.

Only what either cannot do without is counted, so that nothing that would fit is refused:

    memory        the libraries, the module's weights, and the same again while a graph or an engine is written
    cache         the lowered graph
    output        one engine per target: its weights in the target's precision; of a compression nothing, since how
                  much smaller its weights come out is not known before
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from deploytool.backends.cut import COMPILED
from deploytool.errors import EnvironmentLacking
from deploytool.source import ModelRef
from deploytool.target import Target
from deploytool.worker import Limits, cache_folder

_WEIGHTS = (".safetensors", ".bin", ".gguf", ".onnx", ".data")
_LIBRARIES_BYTES = 120_000_000  # the smallest process that opens an engine or a module: Python, NumPy and one runtime
# Of the 32 of an fp32 weight; everything else may keep all of them.
_BITS = {"int4": 4, "int8": 8, "fp8": 8, "fp16": 16, "bf16": 16}
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Needs:
    """At least so many bytes: of memory at once, in the cache, and below the output."""

    memory: int
    cache: int
    output: int

    def to_json(self) -> dict[str, Any]:
        """As the plan shows it."""
        return asdict(self)


NOTHING_NEEDED = Needs(0, 0, 0)


def weights_of(ref: ModelRef) -> int:
    """Bytes of weights that lie with the model; 0 where they cannot be told without loading it.

    Counted are weight files of a folder, an ONNX file with its data, and files beside a model file named like it. A
    folder that holds its weights in several formats is loaded from one of them: the largest format counts.
    """
    path = Path(ref.path)
    if path.is_dir():
        files = [p for p in path.iterdir() if p.suffix in _WEIGHTS and p.is_file()]
    else:
        files = [p for p in path.parent.glob(f"{path.stem}.*") if p.suffix in _WEIGHTS and p.is_file()]
    sizes: dict[str, int] = {}
    for file in files:
        kind = ".onnx" if file.suffix == ".data" else file.suffix
        sizes[kind] = sizes.get(kind, 0) + file.stat().st_size
    return max(sizes.values(), default=0)


def needs(weights: int, targets: Sequence[Target], graph: bool) -> Needs:
    """What exporting a model with so many bytes of weights to these targets takes at least."""
    engines = sum(weights * _BITS.get(t.precision, 32) // 32 * _copies(t) for t in targets if t.backend != "eager")
    return Needs(_LIBRARIES_BYTES + 2 * weights, weights if graph else 0, engines)


def _copies(target: Target) -> int:
    """How often an artifact's weights are written: packages keep the program that they were compiled of beside them."""
    return 2 if target.backend in COMPILED and target.build.get("keep_program", True) else 1


def compression_needs(weights: int) -> Needs:
    """What compressing a model with so many bytes of weights takes at least."""
    return Needs(_LIBRARIES_BYTES + weights, 0, 0)


def refuse_impossible(needed: Needs, out: Path, limits: Limits) -> None:
    """Raise EnvironmentLacking when memory, the cache's disk or the output's disk cannot hold what is needed."""
    lacking = []
    for what, there in memory_there(limits):
        if needed.memory > there:
            lacking.append(f"memory: at least {_mb(needed.memory)} are needed, {what} is {_mb(there)}")
    for what, folder, bytes_needed in _places(needed, out):
        free = shutil.disk_usage(folder).free
        if bytes_needed > free:
            lacking.append(
                f"disk: at least {_mb(bytes_needed)} are needed for {what}, {_mb(free)} are free at {folder}"
            )
    if lacking:
        raise EnvironmentLacking("DT405", "memory and disk must hold the model and its artifacts (they do not)",
                                 detail=lacking,
                                 fix="free some, choose another -o or DEPLOYTOOL_CACHE, or fewer targets")  # fmt: skip


def memory_there(limits: Limits) -> Iterable[tuple[str, int]]:
    """What bounds the memory of one process here: the machine's free memory, a container's limit, the user's own."""
    yield "free", int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # no such limit: "max" is no number
        yield "this container's limit", int(_CGROUP_LIMIT.read_text())
    if limits.memory_bytes is not None:
        yield "--memory-limit", limits.memory_bytes


def _places(needed: Needs, out: Path) -> list[tuple[str, Path, int]]:
    """What lies where; cache and output on one file system need their sum."""
    cache, output = _existing(cache_folder()), _existing(out)
    if cache.stat().st_dev == output.stat().st_dev:
        return [("cache and output", output, needed.cache + needed.output)]
    return [("the cache", cache, needed.cache), ("the output", output, needed.output)]


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())


def _mb(count: int) -> str:
    return f"{count / 1e6:.0f} MB"

"""What TensorRT finds out on a GPU, kept between runs in deploytool's cache folder: artifacts are the same without.

Full TensorRT times kernels as it builds, and its timing cache spares the next build that. TensorRT-RTX compiles kernels
where an engine is opened and first run at a size, and its runtime cache spares the next opening that; its own timing
cache does nothing. Both hold for one kind of GPU and one version, which TensorRT checks: what does not fit is begun
anew. What cannot be read or written costs time only. It takes a GPU to run this, and none ever has: the calls are
checked against TensorRT's published types, and against the installed TensorRT-RTX.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/advanced.html (timing cache)
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-runtime-cache.html
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploytool import worker
from deploytool.errors import EnvironmentLacking
from deploytool.storage import new_file

if TYPE_CHECKING:
    import tensorrt

_GPUS = Path("/proc/driver/nvidia/gpus")


class Timings:
    """The timing cache of full TensorRT, set for a build; to be kept when that has ended well."""

    def __init__(self, trt: Any, config: tensorrt.IBuilderConfig) -> None:
        self._path = _place(trt, "timings", "")
        cache: tensorrt.ITimingCache | None = config.create_timing_cache(_read(self._path))
        if cache is None or not config.set_timing_cache(cache, False):
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        self._cache = cache

    def keep(self) -> None:
        """Write the cache for the next build."""
        found: Any = self._cache.serialize()
        _write(self._path, bytes(found))


def timings(trt: Any, config: tensorrt.IBuilderConfig) -> Timings | None:
    """A timing cache for the build; None with TensorRT-RTX, where it does nothing."""
    return Timings(trt, config) if trt.__name__ == "tensorrt" else None


class Kernels:
    """The runtime cache of TensorRT-RTX for one engine. `config` is what its execution context is to be made with."""

    def __init__(self, config: Any, path: Path) -> None:
        self.config, self._path = config, path
        self._cache = config.create_runtime_cache()
        self._before = _read(path)
        if self._before and not self._cache.deserialize(self._before):
            self._cache.reset()
        self._used = bool(config.set_runtime_cache(self._cache))

    def keep(self) -> None:
        """Write what was compiled, where that is more or other than was read."""
        found = bytes(self._cache.serialize()) if self._used else b""
        if found and found != self._before:
            _write(self._path, found)


def kernels(trt: Any, engine: Any, plan: bytes) -> Kernels | None:
    """The runtime cache of an engine; None with full TensorRT, whose engines hold their kernels."""
    if not hasattr(trt, "IRuntimeCache"):
        return None
    return Kernels(engine.create_runtime_config(), _place(trt, "kernels", hashlib.sha256(plan).hexdigest()[:16]))


def _place(trt: Any, kind: str, of: str) -> Path:
    """A file for each version and kind of GPU, so that machines that share a folder do not take each other's place."""
    gpus = hashlib.sha256("".join(sorted(map(_model, _GPUS.glob("*/information")))).encode()).hexdigest()[:8]
    name = "-".join(filter(None, (kind, trt.__name__, str(trt.__version__), gpus, of)))
    return worker.cache_folder() / "tensorrt" / f"{name}.cache"


def _model(information: Path) -> str:
    lines = _read(information).decode(errors="replace").splitlines()
    return next((line for line in lines if line.startswith("Model:")), "")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write(path: Path, data: bytes) -> None:
    try:
        with new_file(path) as file:
            file.write(data)
    except (OSError, EnvironmentLacking):
        return  # the next run is as slow as this one was

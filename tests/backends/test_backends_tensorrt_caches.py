"""TensorRT's caches: kept beside artifacts, taken again, begun anew where they do not fit; a GPU is stood in for."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploytool.backends import tensorrt_caches

FULL = SimpleNamespace(__name__="tensorrt", __version__="10.9")
RTX = SimpleNamespace(__name__="tensorrt_rtx", __version__="1.7", IRuntimeCache=object)


class Cache:
    """A runtime or timing cache that grows with every run, for one GPU."""

    def __init__(self, held: bytes = b"") -> None:
        self.held = held

    def deserialize(self, blob: bytes) -> bool:
        self.held = blob + b"?"  # what a refused blob leaves is not to be relied on
        if blob.startswith(b"gpu0"):
            self.held = blob
        return blob.startswith(b"gpu0")

    def reset(self) -> bool:
        self.held = b""
        return True

    def serialize(self) -> bytes:
        return self.held or b"gpu0"


class Config:
    """Of a builder and of a runtime."""

    def __init__(self) -> None:
        self.cache: Cache | None = None

    def create_timing_cache(self, blob: bytes) -> Cache:
        return Cache(blob)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        if cache.held and not cache.held.startswith(b"gpu0"):
            return False
        self.cache = cache
        return True

    create_runtime_cache = Cache

    def set_runtime_cache(self, cache: Cache) -> bool:
        self.cache = cache
        return True


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """deploytool's cache folder, of a machine with one kind of GPU."""
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path))
    gpus = tmp_path / "gpus"
    (gpus / "0000").mkdir(parents=True)
    (gpus / "0000" / "information").write_text("Model: \t GPU 0\nIRQ: 12\n")
    monkeypatch.setattr(tensorrt_caches, "_GPUS", gpus)
    return tmp_path / "tensorrt"


def built() -> Cache:
    """What a build was given, which then timed something."""
    config: Any = Config()
    timings = tensorrt_caches.timings(FULL, config)
    assert timings is not None and config.cache is not None
    given = Cache(config.cache.held)
    config.cache.held = config.cache.serialize() + b" timed"
    timings.keep()
    return given


def test_a_second_build_has_the_timings_of_the_first(folder: Path) -> None:
    """What the first build timed must be given to the second, in one file for each version."""
    assert [built().held, built().held] == [b"", b"gpu0 timed"]
    assert len(list(folder.iterdir())) == 1


def test_timings_of_another_gpu_are_begun_anew(folder: Path) -> None:
    """A file that TensorRT refuses must neither end the build nor be given again."""
    built()
    file = next(folder.iterdir())
    file.write_bytes(b"gpu1 timed")
    assert built().held == b""
    assert file.read_bytes() == b"gpu0 timed"


def test_a_folder_that_cannot_be_written_costs_time_only(folder: Path) -> None:
    """A build must end well where the cache cannot be kept."""
    folder.write_text("a file in the folder's place")
    assert built().held == b""


def opened(plan: bytes, compiles: bytes = b"") -> tuple[Config, Cache]:
    """The configuration of a context, and what its cache held before anything was compiled."""
    config = Config()
    engine = SimpleNamespace(create_runtime_config=lambda: config)
    kept = tensorrt_caches.kernels(RTX, engine, plan)
    assert kept is not None and kept.config is config and config.cache is not None
    before = Cache(config.cache.held)
    config.cache.held = config.cache.serialize() + compiles
    kept.keep()
    return config, before


def test_a_second_opening_has_the_kernels_of_the_first(folder: Path) -> None:
    """What was compiled for an engine must be there when it is opened again, and only for that engine."""
    assert opened(b"plan", b" compiled")[1].held == b""
    assert opened(b"plan")[1].held == b"gpu0 compiled"
    assert opened(b"another plan", b" too")[1].held == b""
    assert len(list(folder.iterdir())) == 2


def test_kernels_of_another_gpu_are_begun_anew(folder: Path) -> None:
    """A file that TensorRT-RTX refuses must be compiled anew, not added to."""
    opened(b"plan", b" compiled")
    file = next(folder.iterdir())
    file.write_bytes(b"gpu1")
    assert opened(b"plan", b" again")[1].held == b""
    assert file.read_bytes() == b"gpu0 again"


def test_machines_that_share_a_folder_have_files_of_their_own(folder: Path, tmp_path: Path) -> None:
    """Another kind of GPU must not take the place of what the first one has found out."""
    built()
    (tmp_path / "gpus" / "0000" / "information").write_text("Model: \t GPU 1\n")
    assert built().held == b""
    assert len(list(folder.iterdir())) == 2


def test_each_library_has_the_cache_that_does_something() -> None:
    """TensorRT-RTX ignores timings, and engines of full TensorRT hold their kernels: neither is asked for them."""
    assert tensorrt_caches.timings(RTX, object()) is None  # type: ignore[arg-type]
    assert tensorrt_caches.kernels(FULL, object(), b"plan") is None


def test_the_installed_rtx_has_these_calls() -> None:
    """Names, arguments and results of the runtime cache's calls must be those of the installed TensorRT-RTX."""
    trt = pytest.importorskip("tensorrt_rtx")
    for owner, call in (
        (trt.ICudaEngine, r"create_runtime_config\(self: \S+\) -> \S*IRuntimeConfig"),
        (trt.ICudaEngine, r"create_execution_context\(self: \S+, runtime_config: \S*IRuntimeConfig = None\)"),
        (trt.IRuntimeConfig, r"create_runtime_cache\(self: \S+\) -> \S*IRuntimeCache"),
        (trt.IRuntimeConfig, r"set_runtime_cache\(self: \S+, cache: \S*IRuntimeCache = None\) -> bool"),
        (trt.IRuntimeCache, r"deserialize\(self: \S+, blob: \S*Buffer\) -> bool"),
        (trt.IRuntimeCache, r"serialize\(self: \S+\) -> \S*IHostMemory"),
        (trt.IRuntimeCache, r"reset\(self: \S+\) -> bool"),
    ):
        said = getattr(owner, call.partition("\\")[0]).__doc__
        assert re.search(call, said), said


def test_the_builders_calls_run(folder: Path) -> None:
    """A real builder must take the calls around its timing cache, and give what can be kept and taken again."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Timing cache operations are no-ops", category=DeprecationWarning)
        for _ in range(2):
            tensorrt_caches.Timings(trt, builder.create_builder_config()).keep()
    assert [path.stat().st_size > 0 for path in folder.iterdir()] == [True]

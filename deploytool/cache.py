"""Prepared models, kept between runs and found again by what they were made from.

The key is a hash of the model file, every file that it read, the options, the versions of the libraries and of
deploytool's own code. Which files a model reads is known only after it was loaded once;
the list is kept beside and checked on the next run, so that an unchanged model is found without importing torch.
Size and time of every prepared file are kept there too: an entry that something has changed since is made again.
A file that the system says was not written since it was hashed is not hashed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from deploytool import worker
from deploytool.errors import EnvironmentLacking
from deploytool.source import ModelRef
from deploytool.storage import read_json, settle, sha256_file, write_json, writing

_PACKAGES = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy", "transformers", "tokenizers", "safetensors",
             "optimum")  # fmt: skip
_ROOMS = (".", "load", "lower", "backends", "verify")  # the last two made the figures that are kept with an entry
_TENSORRT = "tensorrt"
_LOCK_SECONDS = 1800.0
_KEEP_SUPERSEDED_SECONDS = 3600.0
_KEEP_ABANDONED_SECONDS = 86_400.0
_CLOCK_NS = 2_000_000_000  # the coarsest time that a file system keeps
_CHANGED = 2  # place of the time of change in a stamp


@dataclass(frozen=True)
class Prepared:
    """A prepared folder (see lower/prepare.py), and whether it was found or made now.

    fingerprint   a digest of the model and all files that it was read from: what was prepared, not how
    notes         what has to be said of how it was prepared
    """

    folder: Path
    fingerprint: str
    cached: bool
    seconds: float
    info: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def prepare(
    ref: ModelRef, *, exporter: str | None = "auto", seed: int = 0, limits: worker.Limits = worker.NO_LIMITS,
    use: bool = True, soon: Callable[[], None] = lambda: None, run: Callable[..., Any] | None = None,
) -> Prepared:  # fmt: skip
    """The prepared folder of a model: from the cache when nothing changed, else made in a worker.

    Without an exporter no ONNX graph is made. With `use` False it is made anew even when it is there. `soon` is called
    when the folder will be there in a moment: an entry is known, or what was made is just put in place. `run` stands in
    for `worker.run`. Raises what the worker raises; EnvironmentLacking when another process holds the lock for half an
    hour.
    """
    started = time.perf_counter()
    options = {"exporter": exporter, "seed": seed}
    root = worker.cache_folder()
    index = root / "index" / f"{_digest([asdict(ref), options])[:32]}.json"
    index.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(index.with_suffix(".lock"), timeout=_LOCK_SECONDS):
            found = _find(root, index, ref, options, soon) if use else None
            folder = found or _make(root, index, ref, options, soon, partial(run or worker.run, limits=limits))
    except Timeout as error:
        raise EnvironmentLacking("DT404", f"the cache entry of {ref.name!r} must be free (another process holds it)",
                                 fix=f"wait for it; the lock is {index.with_suffix('.lock')}") from error  # fmt: skip
    info = read_json(folder / "prepared.json")
    fingerprint = str(read_json(index)["fingerprint"])
    return Prepared(folder, fingerprint, found is not None, time.perf_counter() - started, info)


@dataclass(frozen=True)
class Entry:
    """One prepared folder of the cache, or file of TensorRT's; `used_unix_seconds` is when a run last found the folder,
    or wrote the file."""

    name: str
    model: str
    size_bytes: int
    used_unix_seconds: float


def entries() -> list[Entry]:
    """What is kept, the longest unused first; folders that are just being made are left out."""
    found = []
    for folder in sorted((worker.cache_folder() / "lowered").glob("[!.]*")):
        try:
            model = str(read_json(folder / "prepared.json")["name"])
        except (OSError, ValueError, KeyError, TypeError):
            model = "?"
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        found.append(Entry(folder.name, model, size, folder.stat().st_mtime))
    for file in (worker.cache_folder() / _TENSORRT).glob("[!.]*"):  # see backends/tensorrt_caches.py
        found.append(Entry(f"{_TENSORRT}/{file.name}", "TensorRT", file.stat().st_size, file.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used_unix_seconds)


def drop(unused: Sequence[Entry]) -> None:
    """Remove entries; each first gets a name under which no run looks for it, so that none finds half of one."""
    lowered = worker.cache_folder() / "lowered"
    for entry in unused:
        if entry.name.startswith(f"{_TENSORRT}/"):
            (worker.cache_folder() / entry.name).unlink(missing_ok=True)
            continue
        away = lowered / f".gone-{entry.name}"
        (lowered / entry.name).rename(away)
        shutil.rmtree(away)


def _find(
    root: Path, index: Path, ref: ModelRef, options: Mapping[str, Any], soon: Callable[[], None]
) -> Path | None:
    entry = _read_index(index)
    if entry is None:
        return None
    soon()
    started = time.time_ns()
    hashed = {path: _hash_of(Path(path), known) for path, known in entry["dependencies"].items()}
    folder = root / "lowered" / _key(_fingerprint(ref, hashed), options)
    if folder.name != entry["folder"] or not folder.is_dir() or not entry["files"].items() <= _listing(folder).items():
        return None
    os.utime(folder)
    noted = _noted(hashed, started)
    if noted != entry["dependencies"]:
        write_json(index, {**entry, "dependencies": noted})
    return folder


def _read_index(index: Path) -> dict[str, Any] | None:
    """What is kept of an entry; None where there is none, or nothing that can be used."""
    try:
        entry = read_json(index)
        known = {str(path): list(seen) or [None] for path, seen in entry["dependencies"].items()}
        return {"dependencies": known, "folder": str(entry["folder"]),
                "files": dict(entry["files"]), "fingerprint": str(entry["fingerprint"])}  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _listing(folder: Path) -> dict[str, list[int]]:
    """Size and time of change, in nanoseconds, of every file."""
    found = {p.relative_to(folder).as_posix(): p.stat() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _make(
    root: Path, index: Path, ref: ModelRef, options: Mapping[str, Any], soon: Callable[[], None],
    run: Callable[..., Any],
) -> Path:  # fmt: skip
    lowered = root / "lowered"
    lowered.mkdir(parents=True, exist_ok=True)
    _drop_abandoned(lowered)
    started = time.time_ns()
    with writing(lowered):
        temporary = Path(tempfile.mkdtemp(dir=lowered, prefix=".tmp-"))
        try:
            info = run(f"preparing {ref.name}", "deploytool.lower.prepare:prepare_job", ref=asdict(ref),
                       out=str(temporary), **options)  # fmt: skip
            soon()
            fingerprint = _fingerprint(ref, info["dependencies"])
            folder = lowered / _key(fingerprint, options)
            files = _listing(temporary)
            settle(temporary, folder)  # in one step: another run may be reading the one that is there
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    _drop_superseded(index, folder)
    write_json(index, {"dependencies": _noted(info["dependencies"], started), "folder": folder.name, "files": files,
                       "fingerprint": fingerprint})  # fmt: skip
    return folder


def _drop_abandoned(lowered: Path) -> None:
    """Remove what a process that was killed outright left behind a day ago or earlier."""
    for path in lowered.glob(".*"):
        if time.time() - path.stat().st_mtime > _KEEP_ABANDONED_SECONDS:
            shutil.rmtree(path, ignore_errors=True)


def _drop_superseded(index: Path, folder: Path) -> None:
    """Remove the entry that this one replaces, unless a run of the last hour may still read it."""
    entry = _read_index(index)
    if entry is None:
        return
    old = folder.parent / entry["folder"]
    if old != folder and old.is_dir() and time.time() - old.stat().st_mtime > _KEEP_SUPERSEDED_SECONDS:
        shutil.rmtree(old, ignore_errors=True)


def _key(fingerprint: str, options: Mapping[str, Any]) -> str:
    return _digest([fingerprint, dict(options), _versions(), _code()])[:32]


def _fingerprint(ref: ModelRef, dependencies: Mapping[str, str | None]) -> str:
    return _digest([asdict(ref), sorted(map(list, dependencies.items()))])[:32]


def _hash_of(path: Path, known: Sequence[Any]) -> str | None:
    """A file's SHA-256, None for what is no file; `known` is its hash and `_stamp` of an earlier look."""
    digest, *stamp = known
    if stamp and stamp == _stamp(path):
        return str(digest)
    return sha256_file(path) if path.is_file() else None


def _stamp(path: Path) -> list[int]:
    """What the system changes whenever a file is written or replaced; empty where it tells no such thing.

    The time of change of the inode cannot be set by a program, unlike the one of the content (stat(2)).
    """
    try:
        stat = path.stat()
    except OSError:
        return []
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev] if os.name == "posix" else []


def _noted(hashed: Mapping[str, str | None], started_ns: int) -> dict[str, list[Any]]:
    """Each file's hash with its stamp, where nothing can have written it after its hashing began at `started_ns`.

    Clocks of file systems are coarse: what was written a moment before may be written again at the same time.
    """
    noted: dict[str, list[Any]] = {}
    for path, digest in hashed.items():
        stamp = _stamp(Path(path)) if digest else []
        settled = len(stamp) > _CHANGED and stamp[_CHANGED] < started_ns - _CLOCK_NS
        noted[path] = [digest, *stamp] if settled else [digest]
    return noted


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _code() -> list[list[str]]:
    package = Path(__file__).parent
    paths = [p for room in _ROOMS for p in sorted((package / room).glob("*.py"))]
    return [[p.relative_to(package).as_posix(), sha256_file(p)] for p in paths]


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

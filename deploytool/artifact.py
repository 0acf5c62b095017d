"""An artifact: a folder with an engine's files and `artifact.json`, which says what they are and how they came."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from deploytool.errors import InputRefused, IntegrityBroken
from deploytool.signature import Signature
from deploytool.storage import read_json, sha256_file, write_json

SCHEMA_VERSION = "1.0"
MANIFEST = "artifact.json"
BUNDLE = "deploytool.json"  # the manifest of a bundle of artifacts, as `bundle/manifest.py` describes it
REPORT = "report.json"
GOLDEN = "golden"  # folder of recorded cases, as `cases.py` writes them
KEPT = "kept"  # folder of what only a search for wrong nodes reads: no part of the artifact, and not shipped

_NONE: Mapping[str, Any] = {}


@dataclass(frozen=True)
class FileEntry:
    """One file: path relative to the folder with forward slashes, size in bytes, hex SHA-256."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Step:
    """One thing that was done: its name, settings, seconds, and the versions of the packages that did it."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Artifact:
    """The content of one artifact folder.

    backend     name of the file in `deploytool/backends/` that opens it
    format      "source", "torchscript", "pt2", "onnx", "openvino", "executorch",
                "tensorrt"
    entry       the main file, relative to the folder
    precision   what the engine really computes in: "fp32", "fp16", "bf16", "int8", "fp8", "int4"
    executes    False when the engine was built for hardware that is not here; then `entry` is the graph that the
                compiler was given, and that is what runs when the artifact is opened
    target      the profile it was built for, as data
    model       what the user named, and the fingerprint of what that was: {"name", "ref", "fingerprint"}; a bundle
                leaves "ref" out, which is a place on the machine that built it
    settings    what `open` needs to know (threads, options)
    """

    folder: Path
    backend: str
    format: str
    entry: str
    precision: str
    signature: Signature
    executes: bool = True
    target: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Step, ...] = ()
    files: tuple[FileEntry, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of the engine's own files: without golden cases, reports and manifest."""
        return sum(f.size for f in self.files if not f.path.startswith(f"{GOLDEN}/"))

    @property
    def main_file(self) -> Path:
        return self.folder / self.entry

    def save(self, known: Sequence[FileEntry] = ()) -> Artifact:
        """Record every file of the folder and write `artifact.json`; returns the artifact with its files.

        Files in `known` were recorded a moment ago by the same process tree and are not hashed again.
        """
        done = replace(self, files=_scan(self.folder, {entry.path: entry for entry in known}))
        write_json(self.folder / MANIFEST, done.to_json())
        return done

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "backend": self.backend,
            "format": self.format,
            "entry": self.entry,
            "precision": self.precision,
            "executes": self.executes,
            "signature": self.signature.to_json(),
            "target": dict(self.target),
            "model": dict(self.model),
            "settings": dict(self.settings),
            "history": [{"name": s.name, "settings": dict(s.settings), "versions": dict(s.versions),
                         "seconds": s.seconds} for s in self.history],
            "files": [{"path": f.path, "size": f.size, "sha256": f.sha256} for f in self.files],
        }  # fmt: skip

    @classmethod
    def load(cls, folder: Path, *, check: bool = True) -> Artifact:
        """Read a folder's `artifact.json`; with `check`, compare every file's checksum first."""
        manifest = folder / MANIFEST
        if not manifest.is_file():
            raise InputRefused("DT309", f"an artifact folder must hold {MANIFEST} (got {folder})",
                               fix="name a folder that `deploytool export` wrote")  # fmt: skip
        try:
            data = read_json(manifest)
        except ValueError as error:
            raise InputRefused("DT309", f"{manifest} must be JSON in UTF-8 (got: {error})",
                               fix="export the model again") from error  # fmt: skip
        artifact = cls.from_json(folder, data)
        if check:
            artifact.check()
        return artifact

    @classmethod
    def from_json(cls, folder: Path, data: Mapping[str, Any]) -> Artifact:
        """The artifact that `to_json` described; `folder` is where its files lie. Raises InputRefused."""
        try:
            return cls._from_json(folder, data)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputRefused("DT309", f"{folder / MANIFEST} must follow schema {SCHEMA_VERSION} (got: {error!r})",
                               fix="export the model again") from error  # fmt: skip

    @classmethod
    def _from_json(cls, folder: Path, data: Mapping[str, Any]) -> Artifact:
        if data["schema_version"].split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            raise ValueError(f"schema_version {data['schema_version']}")
        words = [data[key] for key in ("backend", "format", "entry", "precision")]
        if not all(isinstance(word, str) for word in (*words, *(entry["path"] for entry in data["files"]))):
            raise TypeError(f"words must be text, got {words}")
        return cls(
            folder=folder,
            backend=data["backend"],
            format=data["format"],
            entry=data["entry"],
            precision=data["precision"],
            executes=data["executes"],
            signature=Signature.from_json(data["signature"]),
            target=data["target"],
            model=data["model"],
            settings=data["settings"],
            history=tuple(Step(**step) for step in data["history"]),
            files=tuple(FileEntry(**entry) for entry in data["files"]),
        )

    def check(self) -> None:
        """Raise IntegrityBroken unless the folder holds exactly the files of the manifest, unchanged."""
        known = {f.path: f for f in self.files}
        there = {f.path: f for f in _scan(self.folder)}
        problems = [f"missing: {p}" for p in {**known, self.entry: None} if p not in there]
        problems += [f"added: {p}" for p in there if p not in known]
        problems += [f"changed: {p}" for p, f in known.items() if p in there and there[p] != f]
        problems += [f"named twice: {p}" for p in known if len([f for f in self.files if f.path == p]) > 1]
        if problems:
            raise IntegrityBroken("DT601", f"{self.folder} must hold the files of its manifest, unchanged",
                                  detail=problems, fix="export it again, or restore the files")  # fmt: skip


def _scan(folder: Path, known: Mapping[str, FileEntry] = _NONE) -> tuple[FileEntry, ...]:
    """Every file but the manifest, the report and what is kept beside, sorted by path.

    Raises IntegrityBroken at a link or device.
    """
    found = []
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            kind = path.lstat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise IntegrityBroken("DT601", f"an artifact must hold regular files only (got {path})",
                                      fix="replace links by the files that they point to")  # fmt: skip
        found += [Path(root, name) for name in names]
    paths = {p.relative_to(folder).as_posix(): p for p in found}
    own = [name for name in sorted(paths) if name not in (MANIFEST, REPORT) and not name.startswith(f"{KEPT}/")]
    return tuple(_entry(name, paths[name], known.get(name)) for name in own)


def _entry(name: str, path: Path, known: FileEntry | None) -> FileEntry:
    size = path.stat().st_size
    return known if known and known.size == size else FileEntry(name, size, sha256_file(path))


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions of distributions; those that are not installed are left out."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found

"""Files and folders that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from deploytool.errors import EnvironmentLacking, UsageProblem


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a full disk or a missing permission below into one clear error naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG):
            raise
        raise EnvironmentLacking(
            "DT403", f"{path} must be writable (got: {error.strerror})",
            fix="free some space, or choose another place with -o",
        ) from error  # fmt: skip


@contextmanager
def new_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that becomes `path` when the block ends well: the old one or the whole new one, never half."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.tmp-")
        try:
            os.close(handle)
            with open(temporary, "r+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that it is either the old one or the whole new one, also after a power cut."""
    with new_file(path) as file:
        file.write(data)


def write_json(path: Path, data: Any) -> None:
    """Write data as JSON; NaN and infinity are refused, since JSON has none."""
    write_bytes(path, (json.dumps(data, indent=2, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise unless `path` is free, an empty folder, or may be overwritten."""
    if overwrite or not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    raise UsageProblem("DT203", f"the output must not exist yet (got {path})",
                       fix="choose another -o, or add --overwrite")  # fmt: skip


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends well, and vanishes when it does not."""
    refuse_existing(path, overwrite)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.tmp-"))
        temporary.chmod(0o755)
        try:
            yield temporary
            settle(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def settle(new: Path, path: Path) -> None:
    """Move a finished folder to its place on the same file system, replacing what is there in one step."""
    _sync_tree(new)
    if path.exists():
        aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
        os.replace(path, aside / "old")
        os.replace(new, path)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        os.replace(new, path)
    _sync_folder(path.parent)


def _sync_tree(folder: Path) -> None:
    for root, _, files in os.walk(folder):
        for name in files:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        _sync_folder(Path(root))


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

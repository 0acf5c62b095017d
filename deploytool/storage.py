"""Files and folders that appear whole or not at all: temporary name, fsync, rename."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from deploytool.errors import EnvironmentLacking, UsageProblem

_WORK, _LOCK, _OURS = ".work-", ".lock", ".deploytool"
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's fcntl.h and stdio.h


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def syncing(folder: Path) -> Iterator[None]:
    """Hands what lies in a folder to the disk while the block runs: `settle` then has less to wait for.

    What the block writes, temporary files among it, is left to `settle`. A disk that fails raises here, since the
    system does not tell it a second time.
    """
    tree = list(os.walk(folder))
    with ThreadPoolExecutor(max_workers=1) as pool:
        done = pool.submit(_sync_tree, tree)
        yield
        with writing(folder):
            done.result()


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


def refuse_existing(path: Path, overwrite: bool, marker: str | None = None) -> None:
    """Raise unless `path` is free, a folder empty but for what killed calls left, or may be overwritten.

    `marker` is the file that every output of the kind holds: what lies at `path` without it is somebody else's, and
    stays even when overwriting is asked for.
    """
    if not os.path.lexists(path) or (path.is_dir() and all(_is_abandoned(entry) for entry in path.iterdir())):
        return
    if not overwrite:
        raise UsageProblem("DT203", f"the output must not exist yet (got {path})",
                           fix="choose another -o, or add --overwrite")  # fmt: skip
    if marker is not None and not (path / marker).is_file():
        what = f"a folder without {marker}" if path.is_dir() else "which is no folder"
        raise UsageProblem("DT203", f"only an earlier output of this command is overwritten (got {path}, {what})",
                           fix="choose another -o, or remove it yourself")  # fmt: skip


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A folder below `parent` for what is made on the way. It goes with the block, after a kill with the next call."""
    from filelock import FileLock  # slow to import

    for entry in parent.glob(f"{_WORK}*"):
        if _is_abandoned(entry):
            shutil.rmtree(entry, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=_WORK, dir=parent, ignore_cleanup_errors=True) as folder, \
            FileLock(Path(folder, _LOCK)):  # fmt: skip
        (Path(folder) / _OURS).touch()  # the lock is held: before this, nobody takes the folder for abandoned
        yield Path(folder)


def _is_abandoned(entry: Path) -> bool:
    """Whether it is a work folder whose process has ended; a folder that only has such a name is somebody's."""
    if not entry.name.startswith(_WORK) or entry.is_symlink() or not (entry / _OURS).is_file():
        return False
    from filelock import FileLock, Timeout

    try:
        with FileLock(entry / _LOCK, timeout=0):
            return True
    except (Timeout, OSError):
        return False


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False, marker: str | None = None) -> Iterator[Path]:
    """A temporary sibling folder that becomes `path` when the block ends well, and vanishes when it does not.

    What may be replaced is what `refuse_existing` lets pass.
    """
    refuse_existing(path, overwrite, marker)
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
    """Move a finished folder to its place on the same file system; what was there is replaced and removed.

    Its files can be read by everybody then, as those of `new_file` can.

    Where the system can exchange two names (Linux), there is no moment without a folder at `path`. Elsewhere there is
    a short one, and the old folder comes back when the new one cannot take its place.
    """
    _sync_tree(os.walk(new))
    if not os.path.lexists(path):
        os.replace(new, path)
    elif _exchanged(new, path):
        _remove(new)
    else:
        _replace_by_turns(new, path)
    _sync_folder(path.parent)


def _replace_by_turns(new: Path, path: Path) -> None:
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old-"))
    os.replace(path, aside / "old")
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(aside / "old", path)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step by renameat2(2); False where the C library or file system cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    if rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(other))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink()


def _sync_tree(tree: Iterable[tuple[str, list[str], list[str]]]) -> None:
    for root, _, files in tree:
        for name in files:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                mode = os.fstat(handle).st_mode
                if mode & 0o444 != 0o444:  # some libraries write for their user alone
                    with suppress(PermissionError):  # on file systems without modes
                        os.fchmod(handle, mode | 0o444)
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

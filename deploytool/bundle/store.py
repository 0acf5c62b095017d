"""A bundle's files, whether they lie in a folder or in a tar: names, sizes, and content in chunks."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

from deploytool.bundle.archive import Member, content, read_index
from deploytool.bundle.names import check_names
from deploytool.errors import InputRefused, IntegrityBroken

_CHUNK = 1 << 20


class Store(Protocol):
    """Files by name; names are checked when the store is opened."""

    where: str
    sizes: dict[str, int]

    def chunks(self, name: str) -> Iterator[bytes]:
        """A file's content in chunks."""
        ...


class FolderStore:
    """The files of a folder; links and anything but regular files are refused."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self.folder = folder
        self.sizes = dict(_walk(folder))
        check_names(self.sizes, self.where)

    def chunks(self, name: str) -> Iterator[bytes]:
        with (self.folder / name).open("rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


class TarStore:
    """The files of a tar, without its one top folder."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.where = str(path)
        self._file = file
        members = read_index(file, self.where)
        check_names(members, self.where)
        tops = {name.partition("/")[0] for name in members}
        if len(tops) != 1 or any("/" not in name for name in members):
            raise InputRefused("DT311", f"{path} must hold one top folder (got {', '.join(sorted(tops)) or 'nothing'})")
        self._members: dict[str, Member] = {name.partition("/")[2]: member for name, member in members.items()}
        self.sizes = {name: member.size for name, member in self._members.items()}

    def chunks(self, name: str) -> Iterator[bytes]:
        return content(self._file, self._members[name])


@contextmanager
def open_store(path: Path) -> Iterator[Store]:
    """The files of a bundle; raises InputRefused when it is neither a folder nor a tar of the right form."""
    if path.is_dir():
        yield FolderStore(path)
    elif path.is_file():
        with path.open("rb") as file:
            yield TarStore(path, file)
    else:
        raise InputRefused("DT311", f"a bundle must be a folder or a tar (got {path}, which is not there)")


def read(store: Store, name: str, limit: int) -> bytes:
    """A small file's content; raises IntegrityBroken when it is missing, InputRefused when larger than `limit`."""
    if name not in store.sizes:
        raise IntegrityBroken("DT601", f"{store.where} must hold {name} (it is missing)")
    if store.sizes[name] > limit:
        raise InputRefused("DT311", f"{name} must be at most {limit} bytes (got {store.sizes[name]})")
    return b"".join(store.chunks(name))


def digest(store: Store, name: str) -> str:
    """Hex SHA-256 of a file."""
    sha = hashlib.sha256()
    for chunk in store.chunks(name):
        sha.update(chunk)
    return sha.hexdigest()


def _walk(folder: Path) -> Iterator[tuple[str, int]]:
    for root, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(root, name)
            seen = path.lstat()
            if stat.S_ISREG(seen.st_mode):
                yield path.relative_to(folder).as_posix(), seen.st_size
            elif not stat.S_ISDIR(seen.st_mode):
                raise InputRefused("DT311", f"a bundle must hold regular files only (got {path})")

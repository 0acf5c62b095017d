"""Tar files of one form only, so that equal content gives equal bytes and reading needs no trust.

Layout of POSIX.1-1988 "ustar" (IEEE Std 1003.1, pax, "ustar Interchange Format"): every member a regular file, owner
0:0, time 0, mode 0644 or 0755, names sorted, one top folder. The reader rebuilds each header from what it read and
refuses the file when the bytes differ: links, devices, extensions and hidden data have no way in.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from deploytool.bundle.names import FILE_LIMIT
from deploytool.errors import InputRefused

_BLOCK = 512
_CHUNK = 1 << 20
_SIZE_LIMIT = 8**11  # what the header's size field can say: 8 GiB
_MODES = {False: b"0000644", True: b"0000755"}
_KINDS = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"5": "a folder",
          b"6": "a pipe", b"x": "an extended header", b"g": "an extended header", b"L": "a GNU extension"}  # fmt: skip


@dataclass(frozen=True)
class Member:
    """A file in a tar: its name there, bytes, where its content begins, and whether it may be executed."""

    name: str
    size: int
    offset: int = 0
    executable: bool = False


def write_tar(file: BinaryIO, members: Iterable[tuple[Member, Iterable[bytes]]]) -> None:
    """Write members, each with its content, in the order given; raises InputRefused where ustar can't hold one."""
    for member, chunks in members:
        file.write(_header(member))
        written = 0
        for chunk in chunks:
            written += file.write(chunk)
        if written != member.size:
            raise InputRefused("DT311", f"{member.name} must not change while it is packed "
                                        f"(got {written} bytes instead of {member.size})")  # fmt: skip
        file.write(bytes(-written % _BLOCK))
    file.write(bytes(2 * _BLOCK))


def read_index(file: BinaryIO, where: str) -> dict[str, Member]:
    """The members by name. Nothing is written or read ahead; raises InputRefused at the first byte out of form."""
    length = os.fstat(file.fileno()).st_size
    found: dict[str, Member] = {}
    offset = 0
    while True:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not any(block):
            _check_end(file, block, offset, length, where)
            return found
        member = _parse(block, offset + _BLOCK, where)
        end = member.offset + member.size
        offset = end + -end % _BLOCK
        if offset > length:
            raise InputRefused("DT311", f"{where} must hold all of {member.name!r} "
                                        f"({member.size} bytes declared, the file ends before)")  # fmt: skip
        file.seek(end)
        if any(file.read(offset - end)):
            raise InputRefused("DT311", f"{where} must hold nothing between files (got data after {member.name!r})")
        if member.name in found or len(found) >= FILE_LIMIT:
            raise InputRefused("DT311", f"{where} must name each file once and at most {FILE_LIMIT} of them "
                                        f"(got {member.name!r})")  # fmt: skip
        found[member.name] = member


def content(file: BinaryIO, member: Member) -> Iterator[bytes]:
    """The bytes of a member in chunks of at most 1 MiB."""
    done = 0
    while done < member.size:
        file.seek(member.offset + done)
        chunk = file.read(min(_CHUNK, member.size - done))
        if not chunk:
            raise InputRefused("DT311", f"{member.name} must not change while it is read")
        done += len(chunk)
        yield chunk


def _header(member: Member) -> bytes:
    if member.size >= _SIZE_LIMIT:
        raise InputRefused("DT311", f"a file in a tar must be smaller than 8 GiB (got {member.name!r})",
                           fix="use --format dir")  # fmt: skip
    prefix, name = _split(member.name)
    fields = (name.ljust(100, b"\0"), _MODES[member.executable] + b"\0", b"0000000\0", b"0000000\0",
              b"%011o\0" % member.size, b"00000000000\0", b" " * 8, b"0", bytes(100), b"ustar\00000", bytes(64),
              b"0000000\0", b"0000000\0", prefix.ljust(155, b"\0"), bytes(12))  # fmt: skip
    block = b"".join(fields)
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def _split(name: str) -> tuple[bytes, bytes]:
    """The header's prefix and name fields: 155 and 100 bytes, joined by a slash."""
    encoded = name.encode()
    if len(encoded) <= 100:
        return b"", encoded
    cut = encoded.rfind(b"/", 0, 156)
    if cut <= 0 or len(encoded) - cut - 1 > 100:
        raise InputRefused("DT311", f"a name in a tar must be shorter (got {name!r})", fix="use --format dir")
    return encoded[:cut], encoded[cut + 1 :]


def _parse(block: bytes, offset: int, where: str) -> Member:
    if len(block) != _BLOCK or block[257:265] != b"ustar\00000":
        raise InputRefused("DT311", f"{where} must be a tar as `deploytool package` writes it",
                           detail=[f"no header of that form at byte {offset - _BLOCK}"],
                           fix="get the bundle again, from whoever released it")  # fmt: skip
    try:
        name = b"/".join(part for part in (block[345:500].rstrip(b"\0"), block[:100].rstrip(b"\0")) if part).decode()
        size = int(block[124:135], 8)
    except ValueError as error:
        raise InputRefused("DT311", f"{where} must have readable headers (got: {error})") from error
    kind = block[156:157]
    if kind != b"0":
        raise InputRefused("DT311", f"{where} must hold regular files only "
                                    f"(got {name!r}, {_KINDS.get(kind, 'of an unknown kind')})")  # fmt: skip
    member = Member(name, size, offset, block[100:107] == _MODES[True])
    if size < 0 or _header(member) != block:
        raise InputRefused("DT311", f"{where} must have headers as `deploytool package` writes them "
                                    f"(got another one for {name!r})")  # fmt: skip
    return member


def _check_end(file: BinaryIO, block: bytes, offset: int, length: int, where: str) -> None:
    rest = file.read(_BLOCK + 1)
    if len(block) != _BLOCK or len(rest) != _BLOCK or any(rest) or offset + 2 * _BLOCK != length:
        raise InputRefused("DT311", f"{where} must end with two empty blocks (it is cut off, or more follows)")

"""Which file names a bundle may hold: those that mean the same file on every system, inside the bundle."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from deploytool.errors import InputRefused

_PART = re.compile(r"[^\x00-\x1f\x7f\\:<>\"|?*/]{1,120}")
_LENGTH_LIMIT = 240  # of the whole path, UTF-8 bytes; a tar header of 1988 holds 255
FILE_LIMIT = 10_000  # files in a bundle
LABEL = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"  # a bundle's name and version, a variant's name


def check_names(names: Iterable[str], where: str) -> None:
    """Raise InputRefused unless every name is a plain relative path and no two are the same but for case."""
    seen: dict[str, str] = {}
    for count, name in enumerate(names, start=1):
        if count > FILE_LIMIT:
            raise InputRefused("DT311", f"{where} must hold at most {FILE_LIMIT} files (got more)")
        if reason := _unsafe(name):
            raise InputRefused("DT311", f"{where} must hold plain relative file names (got {name!r}: {reason})")
        twin = seen.setdefault(_folded(name), name)
        if twin != name or count != len(seen):
            raise InputRefused("DT311", f"{where} must hold no two files of one name (got {twin!r} and {name!r})")
    for folded, name in seen.items():
        parents = folded.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            if other := seen.get("/".join(parents[:depth])):
                raise InputRefused("DT311", f"{where} must not use one name as file and folder "
                                            f"(got {other!r} and {name!r})")  # fmt: skip


def _folded(name: str) -> str:
    """What file systems that ignore case and Unicode form make of a name."""
    return unicodedata.normalize("NFC", name.casefold())


def _unsafe(name: str) -> str:
    if name.startswith("/"):
        return "absolute"
    if not name or len(name.encode("utf-8", "surrogatepass")) > _LENGTH_LIMIT:
        return f"not between 1 and {_LENGTH_LIMIT} bytes"
    for part in name.split("/"):
        if part in ("", ".", ".."):
            return "an empty, '.' or '..' part"
        if not _PART.fullmatch(part) or not part.isprintable():
            return "a part that is too long or holds unusual characters"
        if part.endswith((" ", ".")):
            return "a part that ends in a space or dot"
    return ""

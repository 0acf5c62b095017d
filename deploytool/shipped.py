"""Where the profiles and models that come with deploytool lie."""

from __future__ import annotations

from pathlib import Path

from deploytool.errors import InternalError

_PACKAGE = Path(__file__).parent


def shipped(kind: str) -> Path:
    """The folder `targets` or `models`: inside an installed package, or beside it in a checkout."""
    for folder in (_PACKAGE / "_shipped" / kind, _PACKAGE.parent / kind):
        if folder.is_dir():
            return folder
    raise InternalError("DT900", f"the installation must contain the folder {kind!r} (none found)")


def find(kind: str, name: str, suffix: str) -> Path | None:
    """The file that `name` means: a path when it holds a slash or a suffix, else a shipped name.

    Returns None when there is no such file; the caller knows how to say so.
    """
    path = Path(name) if is_path(name) else shipped(kind) / f"{name}{suffix}"
    return path if path.is_file() else None


def is_path(name: str) -> bool:
    """Whether a name is a path: it holds a slash or a suffix."""
    return "/" in name or bool(Path(name).suffix)


def unfound(name: str) -> str:
    """A name for which `find` gave nothing, and that the path does not exist where it is one."""
    return repr(name) + (", which does not exist" if is_path(name) and not Path(name).exists() else "")


def names(kind: str, suffix: str) -> list[str]:
    """The shipped names of a kind, sorted."""
    return sorted(p.stem for p in shipped(kind).glob(f"*{suffix}") if not p.name.startswith("_"))

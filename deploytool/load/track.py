"""Which files a model was read from: so that a cached lowering is never used for a changed model."""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch  # holds the name that its load_file calls

_CODE = {".py", ".pyc", ".so", ".pth"}
_WEIGHTS = {".safetensors", ".gguf", ".bin", ".pt", ".npz", ".npy", ".onnx", ".data"}
_SYSTEM = ("/proc/", "/sys/", "/dev/", "/etc/", "/usr/share/")
_opened: set[str] | None = None


@contextmanager
def tracking() -> Iterator[set[Path]]:
    """Collects the files read inside the block; the set is complete when the block has ended.

    It holds the data files opened by Python code and by safetensors, the weight files beside them (libraries written
    in other languages open those unseen), and the modules imported from outside the Python installation.
    """
    global _opened
    _install_hook()
    _opened, found = set(), set[Path]()
    try:
        with _noting_safetensors():
            yield found
    finally:
        opened, _opened = _opened, None
        for path in map(Path, opened):
            if path.suffix not in _CODE and path.is_file() and not _is_system(path):
                found.update((path, *(p for p in path.parent.iterdir() if p.suffix in _WEIGHTS)))
        found.update(_own_modules())


def _own_modules() -> set[Path]:
    """Files of imported modules that belong to neither Python, an installed package, nor deploytool."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots.append(Path(__file__).parents[1])
    modules = (module for name, module in list(sys.modules.items()) if name != "__main__")
    files = {Path(file).absolute() for m in modules if (file := getattr(m, "__file__", None))}
    return {f for f in files if f.is_file() and not any(f.is_relative_to(root) for root in roots)}


def _is_system(path: Path) -> bool:
    """Files of the machine and metadata of packages: versions are in the cache key anyway."""
    return str(path).startswith(_SYSTEM) or path.parent.suffix == ".dist-info"


@contextmanager
def _noting_safetensors() -> Iterator[None]:
    """safetensors opens its files in Rust, where no audit event is raised: the names that it is given are noted."""
    real = safetensors.safe_open

    def noting(filename: Any, *args: Any, **kwargs: Any) -> Any:
        if _opened is not None:
            _opened.add(str(filename))
        return real(filename, *args, **kwargs)

    holders = [m for m in list(sys.modules.values()) if getattr(m, "__dict__", {}).get("safe_open") is real]
    try:
        for module in holders:
            vars(module)["safe_open"] = noting
        yield
    finally:
        for module in holders:
            vars(module)["safe_open"] = real


def _install_hook() -> None:
    """Audit hooks cannot be removed, so one is installed once and does nothing outside `tracking`."""
    if not getattr(sys, "_deploytool_hook", False):
        sys.addaudithook(_on_event)
        sys._deploytool_hook = True  # type: ignore[attr-defined]


def _on_event(event: str, arguments: tuple[Any, ...]) -> None:
    if event != "open" or _opened is None:
        return
    path, mode, _ = arguments
    if isinstance(path, (str, Path)) and (mode is None or "r" in str(mode)):
        _opened.add(str(path))

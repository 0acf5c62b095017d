"""A process and its descendants: their memory, and their end."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable

import psutil


def kill_all(pid: int, family: Iterable[psutil.Process]) -> None:
    """End the child's process group, and descendants that left it; none may outlive the worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()


def descendants(pid: int) -> list[psutil.Process]:
    """The living descendants of a process; none when it is gone."""
    try:
        return list(psutil.Process(pid).children(recursive=True))
    except psutil.Error:
        return []


def tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants; 0 when it is gone."""
    try:
        return sum(_rss(p) for p in (psutil.Process(pid), *descendants(pid)))
    except psutil.Error:
        return 0


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0

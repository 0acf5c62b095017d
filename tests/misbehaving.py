"""What a worker's child may do: functions that the tests of `deploytool.worker` run by name."""

from __future__ import annotations

import ctypes
import gc
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from deploytool import child
from deploytool.child import progress, uncollected
from deploytool.errors import InputRefused


def add(a: float, b: float) -> float:
    return a + b


def echo(value: Any) -> Any:
    return value


def refuse() -> None:
    raise InputRefused("DT301", "the model must exist (got none)", detail=["looked here"], fix="make one")


def raise_value_error() -> None:
    raise ValueError("seven is no colour")


def return_object() -> object:
    return object()


def count(steps: int) -> int:
    for step in range(steps):
        progress(f"step {step}")
    return steps


def drip(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        progress("still here")
        time.sleep(0.02)


def segfault() -> None:
    print("about to read address zero", file=sys.stderr, flush=True)
    ctypes.string_at(0)


def leave(status: int) -> None:
    os._exit(status)


def leave_politely() -> None:
    sys.exit(0)


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang(pid_file: str) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Path(pid_file).write_text(str(os.getpid()))
    while True:
        time.sleep(3600)


def hog(megabytes: int) -> None:
    held = []
    for _ in range(megabytes // 10):
        held.append(bytearray(os.urandom(1000) * 10_000))
        time.sleep(0.01)
    time.sleep(3600)


def memory_error() -> None:
    raise MemoryError


def shout(megabytes: int) -> int:
    line = b"x" * 99_999 + b"\n"
    for _ in range(megabytes * 10):
        os.write(2, line)
        time.sleep(0.0005)
    os.write(2, b"the last words\n")
    return megabytes


def say_numbers(lines: int) -> None:
    for number in range(lines):
        os.write(2, b"%d" % number + b" " * 990 + b"\n")


def say_and_raise(text: str) -> None:
    print(text, flush=True)
    raise ValueError(text)


def answer_with(text: str) -> None:
    """Write to the reply pipe what no worker would."""
    assert child._reply_pipe is not None
    os.write(child._reply_pipe, text.encode("latin-1"))
    time.sleep(3600)


def spawn(pid_file: str, new_session: bool) -> int:
    """Start a grandchild that would sleep for an hour, and answer."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=new_session)
    Path(pid_file).write_text(str(child.pid))
    return child.pid


def spawn_and_hang(pid_file: str, new_session: bool) -> None:
    spawn(pid_file, new_session)
    time.sleep(3600)


def fork_and_die() -> None:
    """Die while a forked grandchild, which holds copies of the pipes, lives on."""
    if os.fork() == 0:
        time.sleep(3600)
    os._exit(3)


def collection(module: str) -> dict[str, int]:
    """What is left out of searches for garbage before and after an import, and whether searches go on."""
    before, held = gc.get_freeze_count(), gc.isenabled()
    with uncollected():
        inside = gc.isenabled()
        importlib.import_module(module)
    return {"before": before, "after": gc.get_freeze_count(), "searching": [held, inside, gc.isenabled()].count(True)}


def module_origin(name: str) -> str:
    return str(__import__(name).__file__)


def environment(name: str) -> str | None:
    return os.environ.get(name)


class Counter:
    """State that stays in the child between calls."""

    def __init__(self, start: int):
        self._value = start

    def increase(self, by: int) -> int:
        self._value += by
        return self._value

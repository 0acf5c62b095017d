"""Child processes for everything that can crash, hang or eat memory: engines, compilers, a user's model file.

A `Worker` is one child. It runs functions named "module:function", or holds one object and runs its methods.
Arguments and results are JSON over a private pipe; arrays go through files. What the child prints goes to a log file
of bounded size. A crash, a time or memory limit ends as one BackendFailed that names the log.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import itertools
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import platformdirs
import psutil

from deploytool.errors import BackendFailed, DeployError, from_json

_LOG_LIMIT_BYTES = 8_000_000
_LOG_TAIL_BYTES = 64_000
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
_PR_SET_PDEATHSIG = 1
_COUNTER = itertools.count()
# Runtimes must not phone home, and tokenizers must not warn about forks.
_CHILD_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Limits:
    """Wall-clock seconds per call and resident bytes of the whole process tree; None is no limit."""

    seconds: float | None = None
    memory_bytes: int | None = None


NO_LIMITS = Limits()


def cache_folder() -> Path:
    """Where lowered models and logs are kept: $DEPLOYTOOL_CACHE, else the platform's cache folder."""
    return Path(os.environ.get("DEPLOYTOOL_CACHE") or platformdirs.user_cache_dir("deploytool"))


class Worker:
    """One child process; a context manager. `name` says what it does, for messages and the log's name."""

    def __init__(
        self, name: str, limits: Limits = NO_LIMITS, environment: Mapping[str, str] | None = None,
        say: Callable[[str], None] | None = None,
    ):  # fmt: skip
        self.name = name
        self.limits = limits
        self._say = say or (lambda line: None)
        folder = cache_folder() / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / f"{name.replace('/', '-').replace(' ', '-')}-{os.getpid()}-{next(_COUNTER)}.log"
        self.peak_bytes = 0
        self._failed = False
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from deploytool.worker import serve; serve({requests}, {replies})"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(requests, replies),
                start_new_session=True, env={**os.environ, **_CHILD_ENVIRONMENT, **(environment or {})},
            )  # fmt: skip
        os.close(requests)
        os.close(replies)
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, function: str, **arguments: Any) -> Any:
        """Run "module:function" in the child and return what it returned."""
        return self._ask({"function": function, "arguments": arguments})

    def create(self, kind: str, **arguments: Any) -> None:
        """Make the object "module:Class" in the child; `invoke` then runs its methods."""
        self._ask({"create": kind, "arguments": arguments})

    def invoke(self, method: str, **arguments: Any) -> Any:
        """Run a method of the object that `create` made."""
        return self._ask({"method": method, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> Any:
        try:
            os.write(self._requests, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            self._raise_dead()
        reply = json.loads(self._read_reply())
        while "progress" in reply:
            self._say(reply["progress"])
            reply = json.loads(self._read_reply())
        if "result" in reply:
            return reply["result"]
        self._failed = True
        if "error" in reply:
            raise from_json(reply["error"])
        if reply["crash"].startswith("MemoryError"):
            raise self._failure("DT503", "must fit into memory (got a MemoryError)")
        raise self._failure("DT504", f"must end well (got {reply['crash']})")

    def _read_reply(self) -> bytes:
        deadline = None if self.limits.seconds is None else time.monotonic() + self.limits.seconds
        while b"\n" not in self._buffer:
            ready, _, _ = select.select([self._replies], [], [], _POLL_SECONDS)
            if ready:
                data = os.read(self._replies, 1 << 20)
                if not data:
                    self._raise_dead()
                self._buffer += data
                continue
            self._cap_log()
            self._check_memory()
            if deadline is not None and time.monotonic() > deadline:
                self._kill()
                raise self._failure("DT502", f"must end within {self.limits.seconds:g} s (it was stopped)")
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _check_memory(self) -> None:
        used = _tree_rss(self._process.pid)
        self.peak_bytes = max(self.peak_bytes, used)
        limit = self.limits.memory_bytes
        if limit is not None and used > limit:
            self._kill()
            raise self._failure("DT503", f"must stay under {limit / 1e6:.0f} MB (got {used / 1e6:.0f} MB)")

    def _cap_log(self) -> None:
        if self.log.stat().st_size > _LOG_LIMIT_BYTES:
            with self.log.open("r+b") as log:
                log.seek(-_LOG_TAIL_BYTES, os.SEEK_END)
                tail = log.read()
                log.truncate(0)
            with self.log.open("ab") as log:
                log.write(b"[earlier output dropped]\n" + tail)

    def _raise_dead(self) -> None:
        self._kill()
        status = self._process.returncode
        got = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status} without an answer"
        raise self._failure("DT501", f"must answer (got {got})")

    def _failure(self, code: str, sentence: str) -> BackendFailed:
        self._failed = True
        said = _tail(self.log) if code == "DT501" else []
        return BackendFailed(code, f"the process for {self.name} {sentence}", detail=said,
                             fix=f"the whole log is {self.log}")  # fmt: skip

    def _kill(self) -> None:
        for sign, wait in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, _GRACE_SECONDS)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, sign)
            try:
                self._process.wait(wait)
                break
            except subprocess.TimeoutExpired:
                continue
        _kill_group(self._process.pid)

    def close(self) -> None:
        """End the child; its log goes when nothing failed."""
        for handle in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                os.close(handle)
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        _kill_group(self._process.pid)
        if not self._failed:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self._kill()  # interrupted: do not wait for a busy child
        self.close()


def _kill_group(pid: int) -> None:
    """Grandchildren share the group; none may outlive the worker."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _tree_rss(pid: int) -> int:
    """Resident bytes of a process and its descendants."""
    try:
        root = psutil.Process(pid)
        return sum(_rss(p) for p in (root, *root.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _tail(log: Path, lines: int = 5) -> list[str]:
    text = log.read_bytes()[-4000:].decode(errors="replace")
    return [line[:300] for line in text.splitlines() if line.strip()][-lines:]


def run(
    name: str, function: str, limits: Limits = NO_LIMITS, say: Callable[[str], None] | None = None, **arguments: Any
) -> Any:
    """Run one function in a child of its own; `say` gets what it reports as progress."""
    with Worker(name, limits, say=say) as worker:
        return worker.call(function, **arguments)


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


_reply_pipe: int | None = None


def progress(line: str) -> None:
    """In a child: tell the parent how far things are. Outside of one it does nothing."""
    if _reply_pipe is not None:
        _send(_reply_pipe, {"progress": line})


def _send(pipe: int, reply: Mapping[str, Any]) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def serve(requests: int, replies: int) -> None:
    """The child's loop: one JSON request a line, one JSON reply a line, until the parent closes the pipe."""
    global _reply_pipe
    # A parent that is killed outright cannot clean up; the kernel then ends this child too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _reply_pipe = replies
    held: list[Any] = []
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            try:
                reply = {"result": _answer(json.loads(line), held)}
                json.dumps(reply)
            except DeployError as error:
                traceback.print_exc()
                reply = {"error": error.to_json()}
            except Exception as error:
                traceback.print_exc()
                reply = {"crash": f"{type(error).__name__}: {error}"[:2000]}
            _send(replies, reply)


def _answer(request: Mapping[str, Any], held: list[Any]) -> Any:
    arguments = request["arguments"]
    if "create" in request:
        held[:] = [_resolve(request["create"])(**arguments)]
        return None
    if "method" in request:
        return getattr(held[0], request["method"])(**arguments)
    return _resolve(request["function"])(**arguments)

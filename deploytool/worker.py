"""Child processes for everything that can crash, hang or eat memory: engines, compilers, a user's model file.

A `Worker` is one child. It runs functions named "module:function", or holds one object and runs its methods.
Arguments and results are JSON over a private pipe; arrays go through files. What the child prints goes to a log file
that is cut to its newest end when it outgrows its limit. A crash, a time or memory limit ends as one BackendFailed
that names the log. The child ends with the thread that made it: make workers in a thread that outlives them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

import platformdirs

from deploytool.errors import BackendFailed, InternalError, from_json
from deploytool.processes import descendants, kill_all, tree_rss

_LOG_LIMIT_BYTES = 8_000_000
_LOG_TAIL_BYTES = 64_000
_LINE_LIMIT_BYTES = 256_000_000
_POLL_SECONDS = 0.05
_MEMORY_POLL_SECONDS = 0.2  # walking the process tree takes milliseconds, which a timed child would feel
_CLOSE_SECONDS = 5.0
_GRACE_SECONDS = 2.0
# With -P, or a file in the working folder could stand in for a library; the package itself may lie in a checkout.
_CHILD = "import sys; sys.path.append(sys.argv[1]); from deploytool.child import serve; serve(*map(int, sys.argv[2:]))"
_COUNTER = itertools.count()
# Runtimes must not phone home, and tokenizers must not warn about forks.
_CHILD_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

# Where nothing is timed, threads that wait must not spin while another process needs the core; and NumPy's own threads
# must not meet an engine's on the same cores: comparing outputs between its calls made them twice as slow.
_UNTIMED_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}


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
        self.log = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[:80]}-{os.getpid()}-{next(_COUNTER)}.log"
        self.peak_bytes = 0
        self._failed = False
        self._closed = False
        self._memory_checked = 0.0
        self._buffer = bytearray()
        self._searched = 0
        requests, self._requests = os.pipe()
        self._replies, replies = os.pipe()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-X", "faulthandler", "-c", _CHILD, str(Path(__file__).parents[1]),
                 str(os.getpid()), str(requests), str(replies)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=(requests, replies),
                start_new_session=True, env={**os.environ, **_CHILD_ENVIRONMENT, **(environment or {})},
            )  # fmt: skip
        os.close(requests)
        os.close(replies)
        os.set_blocking(self._requests, False)  # a child that does not read must not hang us

    @property
    def pid(self) -> int:
        return self._process.pid

    def expect(self, module: str) -> None:
        """Let the child import a module while nothing is asked of it; what goes wrong shows when it is used."""
        with contextlib.suppress(OSError):
            os.write(self._requests, json.dumps({"import": module}).encode() + b"\n")

    def call(self, function: str, /, **arguments: Any) -> Any:
        """Run "module:function" in the child and return what it returned."""
        return self._ask({"function": function, "arguments": arguments})

    def create(self, kind: str, /, **arguments: Any) -> None:
        """Make the object "module:Class" in the child; `invoke` then runs its methods."""
        self._ask({"create": kind, "arguments": arguments})

    def invoke(self, method: str, /, **arguments: Any) -> Any:
        """Run a method of the object that `create` made."""
        return self._ask({"method": method, "arguments": arguments})

    def _ask(self, request: dict[str, Any]) -> Any:
        reply = self._exchange(json.dumps(request).encode() + b"\n")
        if "result" in reply:
            return reply["result"]
        self._failed = True
        if "error" in reply:
            raise from_json(reply["error"])
        if reply["crash"].startswith("MemoryError"):
            raise self._failure("DT503", "must fit into memory (got a MemoryError)")
        if reply.get("ours"):
            raise InternalError("DT900", f"an internal error in {self.name} (got {reply['crash']})",
                                fix=f"please report {self.log}")  # fmt: skip
        raise self._failure("DT504", f"must end well (got {reply['crash']})")

    def _exchange(self, request: bytes) -> dict[str, Any]:
        """Send one line and wait for the answer, passing on progress and watching the limits meanwhile."""
        deadline = None if self.limits.seconds is None else time.monotonic() + self.limits.seconds
        unsent = memoryview(request)
        poll = select.poll()
        poll.register(self._replies, select.POLLIN)
        poll.register(self._requests, select.POLLOUT)
        while True:
            while (line := self._next_line()) is not None:
                reply = self._parse(line)
                if "progress" not in reply:
                    return reply
                self._say(str(reply["progress"]))
            ready = dict(poll.poll(_POLL_SECONDS * 1e3))
            if self._requests in ready:
                unsent = unsent[self._write(unsent) :]
                if not unsent:
                    poll.unregister(self._requests)
            if self._replies in ready:
                self._read()
            elif self._process.poll() is not None and not select.select([self._replies], [], [], 0)[0]:
                self._raise_dead()  # a grandchild holds the pipe open
            self._watch(deadline)

    def _write(self, data: memoryview) -> int:
        try:
            return os.write(self._requests, data)
        except BrokenPipeError:
            self._raise_dead()

    def _read(self) -> None:
        data = os.read(self._replies, 1 << 20)
        if not data:
            self._raise_dead()
        self._buffer += data
        if len(self._buffer) > _LINE_LIMIT_BYTES and b"\n" not in data:
            self._raise_corrupt(f"{len(self._buffer)} bytes without an end")

    def _next_line(self) -> bytes | None:
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            return None
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        return line

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict) or not reply.keys() & {"result", "error", "crash", "progress"}:
            self._raise_corrupt(repr(line[:40]))
        return reply

    def _watch(self, deadline: float | None) -> None:
        now = time.monotonic()
        self._cap_log()
        if now - self._memory_checked > _MEMORY_POLL_SECONDS:
            self._check_memory()
            self._memory_checked = now
        if deadline is not None and now > deadline:
            self._kill()
            raise self._failure("DT502", f"must end within {self.limits.seconds:g} s (it was stopped)")

    def _check_memory(self) -> None:
        used = tree_rss(self._process.pid)
        self.peak_bytes = max(self.peak_bytes, used)
        limit = self.limits.memory_bytes
        if limit is not None and used > limit:
            self._kill()
            raise self._failure("DT503", f"must stay under {limit / 1e6:.0f} MB (got {used / 1e6:.0f} MB)")

    def _cap_log(self) -> None:
        if self.log.stat().st_size <= _LOG_LIMIT_BYTES:
            return
        # The child goes on writing: what it appends while the end is moved to the front is moved as well, in order. One
        # that writes faster than this loses what is beyond a second limit: nobody may be kept from looking at it.
        with self.log.open("r+b", buffering=0) as log:
            source = os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES
            last = source + _LOG_LIMIT_BYTES
            end = os.pwrite(log.fileno(), b"[earlier output dropped]\n", 0)
            while source < last and (piece := os.pread(log.fileno(), _LOG_TAIL_BYTES, source)):
                source += len(piece)
                end += os.pwrite(log.fileno(), piece, end)
            log.truncate(end)

    def _raise_dead(self) -> NoReturn:
        try:
            got = _ending(self._process.wait(_GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            got = "a closed pipe"
        self._kill()
        raise self._failure("DT501", f"must answer (got {got})")

    def _raise_corrupt(self, got: str) -> NoReturn:
        self._kill()
        raise self._failure("DT501", f"must answer with a line of JSON (got {got})")

    def _failure(self, code: str, sentence: str) -> BackendFailed:
        self._failed = True
        self._cap_log()
        said = _tail(self.log) if code == "DT501" else []
        return BackendFailed(code, f"the process for {self.name} {sentence}", detail=said,
                             fix=f"the whole log is {self.log}")  # fmt: skip

    def _kill(self, grace: float = _GRACE_SECONDS) -> None:
        """End the child and all that descends from it; a child that ignores SIGTERM gets `grace` seconds."""
        family = descendants(self._process.pid)
        if grace and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(grace)
        kill_all(self._process.pid, family)
        self._process.wait()

    def kill(self) -> None:
        """End the child at once, whatever it does."""
        self._kill(grace=0)
        self.close()

    def close(self) -> None:
        """End the child; its log goes when nothing failed."""
        if self._closed:
            return
        self._closed = True
        family = descendants(self._process.pid)
        os.close(self._requests)
        os.close(self._replies)
        try:
            self._process.wait(_CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
        kill_all(self._process.pid, family)
        if self._failed:
            self._cap_log()
        else:
            self.log.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):
            self._kill(grace=0)  # interrupted: do not wait for a busy child
        self.close()


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status} without an answer"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = str(-status)
    return f"signal {name}" + (", which the kernel sends when memory runs out" if name == "SIGKILL" else "")


def _tail(log: Path, lines: int = 8) -> list[str]:
    """What the log ends with: the dump of a fatal error from its first line, else the last lines."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16_000))
        text = file.read().decode(errors="replace")
    _, mark, dump = text.rpartition("Fatal Python error")
    said = [line[:300] for line in (mark + dump if mark else text).splitlines() if line.strip()]
    return said[:lines] if mark else said[-lines:]


def run(
    name: str, function: str, /, limits: Limits = NO_LIMITS, say: Callable[[str], None] | None = None, **arguments: Any
) -> Any:
    """Run one function in a child of its own; `say` gets what it reports as progress."""
    with untimed(name, limits, say) as worker:
        return worker.call(function, **arguments)


def untimed(name: str, limits: Limits = NO_LIMITS, say: Callable[[str], None] | None = None) -> Worker:
    """A worker in which nothing is timed: its threads wait without spinning."""
    return Worker(name, limits, _UNTIMED_ENVIRONMENT, say)

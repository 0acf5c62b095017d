"""What runs inside a worker's child process: it does what the parent asks, line by line, and tells how far it is."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploytool.errors import DeployError

_GC_THRESHOLDS = (100_000, 50, 50)
_PR_SET_PDEATHSIG = 1

_reply_pipe: int | None = None


def serve(parent: int, requests: int, replies: int) -> None:
    """The child's loop: one JSON request a line, one JSON reply a line, until the parent closes the pipe."""
    global _reply_pipe
    # A parent that is killed outright cannot clean up; the kernel then ends this child too.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return  # it was killed before the kernel knew
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(requests, False)
    os.set_inheritable(replies, False)
    _reply_pipe = replies
    gc.set_threshold(*_GC_THRESHOLDS)
    held: list[Any] = []
    with os.fdopen(requests, "rb") as lines:
        for line in lines:
            request = json.loads(line)
            if "import" in request:
                with contextlib.suppress(Exception), uncollected():
                    importlib.import_module(request["import"])
                continue
            try:
                reply = {"result": _answer(request, held)}
                json.dumps(reply)
            except DeployError as error:
                traceback.print_exc()
                reply = {"error": error.to_json()}
            except Exception as error:
                traceback.print_exc()
                reply = {"crash": f"{type(error).__name__}: {error}"[:2000], "ours": _is_ours(error)}
            _send(replies, reply)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch apart in good order takes more than a second, and nothing is left to be kept


def progress(line: str) -> None:
    """In a child: tell the parent how far things are. Outside of one it does nothing."""
    if _reply_pipe is not None:
        _send(_reply_pipe, {"progress": line})


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage inside the block: for imports and loading, whose millions of objects stay.

    Walking them again and again is a tenth of what torch and transformers take to import. In a child they are left out
    of later searches as well.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _reply_pipe is not None:
            gc.freeze()
        if enabled:
            gc.enable()


def _answer(request: Mapping[str, Any], held: list[Any]) -> Any:
    arguments = request["arguments"]
    if "create" in request:
        held[:] = [_resolve(request["create"])(**arguments)]
        return None
    if "method" in request:
        return getattr(held[0], request["method"])(**arguments)
    return _resolve(request["function"])(**arguments)


def _resolve(name: str) -> Any:
    module, _, attribute = name.partition(":")
    if module not in sys.modules:
        with uncollected():
            importlib.import_module(module)
    return getattr(sys.modules[module], attribute)


def _send(pipe: int, reply: Mapping[str, Any]) -> None:
    data = json.dumps(reply).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def _is_ours(error: Exception) -> bool:
    """Whether the error was raised by deploytool's own code rather than by a library or a model."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(__file__).parent)

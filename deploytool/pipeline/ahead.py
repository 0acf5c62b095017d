"""Processes started before they are needed: their start and their imports pass while something else works."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from deploytool import worker

_IMPORTED = "deploytool.verify.parity"  # with NumPy, and no engine's library
_LOWERING = "deploytool.lower.prepare"
_ENGINE = "deploytool.backends.ort_graph"  # with ONNX Runtime, which checks every graph, and onnx_ir, which writes most


class Ahead:
    """A process for the lowering, and one that waits for the check of the graph and then for the first target.

    A context manager. Whoever comes when a process is taken, or has failed, gets a new one.
    """

    def __init__(self, limits: worker.Limits) -> None:
        self._limits = limits
        self._waiting: worker.Worker | None = None
        self._lowering: worker.Worker | None = None
        self._typed: Path | None = None

    def expect_lowering(self, *typed: str) -> None:
        """Start the process that lowers; where the same was typed before, and the model is kept, the other."""
        digest = hashlib.sha256(json.dumps([os.getcwd(), *typed]).encode()).hexdigest()
        self._typed = worker.cache_folder() / "typed" / digest[:32]
        if self._typed.exists():
            self.start()
        else:
            self._lowering = worker.untimed("preparing", self._limits)
            self._lowering.expect(_LOWERING)

    def run(self, name: str, function: str, /, limits: worker.Limits, **arguments: Any) -> Any:
        """As `worker.run`, in the process that is expected to lower where there is one."""
        engine, self._lowering = self._lowering or worker.untimed(name, limits), None
        engine.name = name
        with engine:
            result = engine.call(function, **arguments)
            self.start()  # while this one ends
            return result

    def start(self, *, engine: bool = False) -> None:
        """Start the process that waits, unless there is one; it takes 40 MB from here on, with its `engine` 110 MB."""
        self._waiting = self._waiting or self._new("waiting")
        if engine:
            self._waiting.expect(_ENGINE)

    def _new(self, name: str) -> worker.Worker:
        made = worker.untimed(name, self._limits)
        made.expect(_IMPORTED)
        return made

    def take(self, name: str) -> worker.Worker:
        """The process that waits, or a new one; it is the caller's from here on."""
        taken, self._waiting = self._waiting or self._new(name), None
        taken.name = name
        return taken

    @contextmanager
    def lend(self, name: str) -> Iterator[worker.Worker]:
        """A process that waits again when the block ends well."""
        with ExitStack() as stack:
            engine = stack.enter_context(self.take(name))
            yield engine
            stack.pop_all()
        self._waiting = engine

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for unused in (self._waiting, self._lowering):
            if unused:
                unused.kill()
        if error is None and self._typed:
            self._typed.parent.mkdir(parents=True, exist_ok=True)
            self._typed.touch()

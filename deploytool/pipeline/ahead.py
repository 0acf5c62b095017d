"""A process started before it is needed: its start and its imports pass while another stage works."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import Self

from deploytool import worker

_IMPORTED = "deploytool.verify.parity"  # with NumPy, and no engine's library


class Ahead:
    """One process that waits, for the check of the graph and then for the first target; a context manager.

    Whoever comes when it is taken, or has failed, gets a new one.
    """

    def __init__(self, limits: worker.Limits) -> None:
        self._limits = limits
        self._waiting: worker.Worker | None = None

    def start(self) -> None:
        """Start the process that waits, unless there is one; it takes 40 MB from here on."""
        self._waiting = self._waiting or self._new("waiting")

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
        if self._waiting:
            self._waiting.__exit__(kind, error, trace)

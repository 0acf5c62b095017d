"""A runner: an opened engine."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol, Self

from deploytool.signature import Feeds, Outputs, Signature


class Runner(Protocol):
    """Context manager around an engine; `run` maps named arrays to named arrays.

    `run` checks the feeds against the signature (InputRefused), and the arrays that it returns are owned by the
    caller: the engine never writes to them again.
    """

    signature: Signature

    def run(self, feeds: Feeds) -> Outputs: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

"""Lines that say how far training is: a bar, loss, throughput and time left."""

from __future__ import annotations

import time
from collections.abc import Callable

_CELLS = 20
_LINES = 10  # when steps are quick
_SECONDS = 30.0  # a line at least this often when they are slow


class Progress:
    """Tells about ten lines in all, and one every 30 seconds."""

    def __init__(self, tell: Callable[[str], None], total: int, done: int = 0):
        self._tell, self._total, self._first = tell, total, done
        self._started = self._told = time.monotonic()
        self._items = 0.0

    def step(self, done: int, loss: float, rate: float, items: float) -> None:
        """`done` steps of all are behind us; the last had this loss and learning rate and held `items`."""
        self._items += items
        now = time.monotonic()
        if done % max(1, self._total // _LINES) and done != self._total and now - self._told < _SECONDS:
            return
        self._told = now
        seconds = max(now - self._started, 1e-9)
        left = seconds / max(1, done - self._first) * (self._total - done)
        filled = done * _CELLS // self._total
        bar = "#" * filled + "." * (_CELLS - filled)
        self._tell(f"[{bar}] step {done}/{self._total} loss {loss:.4f} rate {rate:.2e} "
                   f"{self._items / seconds:.0f} items/s {clock(left)} left")  # fmt: skip


def clock(seconds: float) -> str:
    """Whole seconds as 1:05 or 2:00:07."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

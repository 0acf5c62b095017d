"""Interleaved blocks: the candidate against each reference in ABBA or BAAB order, drawn at random.

A block is four slots, two of each side. Slow drift of the machine cancels within a block, steps of it hit both sides
alike, and the random order keeps periodic disturbance from siding with one. A guard kernel is timed before and after
each block; blocks during which it moved are not used.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from deploytool.bench.statistics import MIN_BLOCKS, log_ratio
from deploytool.errors import InputRefused

GUARD_MOVED = 0.25  # a guard kernel this much faster or slower than its median marks a disturbed block
_OVERTIME = 2.0  # blocks that a verdict lacks are made up for until this many times the budget
_SLOTS = 4
_WANTED_BLOCKS = 24
_SLOT_SECONDS = (0.1, 0.5)


class Timed(Protocol):
    """Something to run again and again: `time_block` gives milliseconds per run, `rest` waits until it is idle."""

    def time_block(self, seconds: float) -> list[float]: ...

    def rest(self) -> object: ...


@dataclass(frozen=True)
class Block:
    """One block: milliseconds of every run, slot by slot, and the guard kernel's before and after."""

    reference: str
    order: str  # "ABBA" or "BAAB", A is the candidate
    candidate_ms: tuple[tuple[float, ...], ...]
    reference_ms: tuple[tuple[float, ...], ...]
    guard_ms: tuple[float, float]

    @property
    def log_ratio(self) -> float:
        """ln(reference / candidate) of the medians of the slots."""
        return log_ratio(medians(self.candidate_ms), medians(self.reference_ms))


def medians(slots: Sequence[Sequence[float]]) -> list[float]:
    """The median of each slot, ms."""
    return [float(np.median(slot)) for slot in slots]


def measure(
    candidate: Timed,
    references: Mapping[str, Timed],
    guard: Callable[[], float],
    *,
    budget_seconds: float,
    seed: int,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] | None = None,
) -> list[Block]:
    """Time blocks until the budget is used up, each reference in turn; at least one block each.

    When that gave fewer blocks than a verdict needs, up to twice the budget is spent.

    `guard` gives the milliseconds of the fixed kernel. Without references the candidate is timed against itself.
    """
    if not budget_seconds > 0:
        raise InputRefused("DT313", f"the time budget must be above zero (got {budget_seconds:g} s)")
    sides = dict(references) or {"": candidate}
    low, high = _SLOT_SECONDS
    slot = min(high, max(low, budget_seconds / (len(sides) * _SLOTS * _WANTED_BLOCKS)))
    rng = np.random.default_rng(seed)
    start = clock()
    blocks: list[Block] = []
    before = guard()
    while _goes_on(blocks, list(sides), clock() - start, budget_seconds):
        for name in rng.permutation(list(sides)).tolist():
            order = "ABBA" if rng.integers(2) == 0 else "BAAB"
            slots = _slots(order, {"A": candidate, "B": sides[name]}, slot)
            after = guard()
            blocks.append(Block(name, order, tuple(slots["A"]), tuple(slots["B"]), (before, after)))
            before = after
        if report:
            report(f"timed {len(blocks)} blocks, {min(clock() - start, budget_seconds):.0f} of {budget_seconds:.0f} s")
    return blocks


def _slots(order: str, sides: Mapping[str, Timed], seconds: float) -> dict[str, list[tuple[float, ...]]]:
    slots: dict[str, list[tuple[float, ...]]] = {"A": [], "B": []}
    for side, following in zip(order, [*order[1:], ""], strict=True):
        slots[side].append(_settled(sides[side].time_block(seconds)))
        if following != side:
            sides[side].rest()
    return slots


def _settled(times: Sequence[float]) -> tuple[float, ...]:
    """Without the first run, which pays for threads that slept and caches that others used, where runs abound."""
    return tuple(times[1:] if len(times) > _SLOTS else times)


def _goes_on(blocks: Sequence[Block], names: Sequence[str], elapsed: float, budget: float) -> bool:
    if elapsed < budget or not blocks:
        return True
    quiet = undisturbed(blocks)
    lost = any(sum(b.reference == name for b in quiet) < MIN_BLOCKS for name in names)
    return lost and elapsed < _OVERTIME * budget


def undisturbed(blocks: Sequence[Block]) -> list[Block]:
    """The blocks during which the guard kernel stayed near its median over the whole measurement."""
    if not blocks:
        return []
    usual = float(np.median([time for block in blocks for time in block.guard_ms]))
    limit = math.log1p(GUARD_MOVED)
    return [b for b in blocks if all(abs(math.log(time / usual)) <= limit for time in b.guard_ms)]

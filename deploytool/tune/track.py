"""Timing of many artifacts in rounds: each is open in a process of its own, and in a round each has its turn twice.

A round times all entrants in an order drawn at random, then in the reverse order: what drifts during it hits all
alike. A guard kernel before and after it shows whether something else disturbed the machine meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.bench.blocks import GUARD_MOVED, medians
from deploytool.bench.compare import SHORT_MS, Process
from deploytool.bench.energy import MachineMeter
from deploytool.bench.environment import usable_cores
from deploytool.bench.serve import THREAD_LIMITS
from deploytool.worker import Limits, Worker

_WARM_UP_SECONDS = 0.2
_GUARD_THREADS = 8


@dataclass(frozen=True)
class Entrant:
    """What takes part: an artifact opened with runtime settings; `key` is its identity with them."""

    key: str
    artifact: Artifact
    settings: Mapping[str, Any]


class Track:
    """The processes of a search, opened when first needed; a context manager.

    `cases` are the inputs that are timed, one per bucket; `slot` is the seconds of one turn. With a `meter`, energy is
    measured beside time.
    """

    def __init__(self, cases: Sequence[Path], slot: float, limits: Limits, meter: MachineMeter | None = None):
        self._cases = list(cases)
        self._slot = slot
        self._limits = limits
        self._meter = meter
        self._open: dict[str, tuple[Process, ExitStack]] = {}
        self._guard: Worker | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Track:
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()
        self._stack.close()

    def clear(self) -> None:
        """End every process; what is timed next is opened anew."""
        for key in list(self._open):
            self.close(key)

    def close(self, key: str) -> None:
        """End the process of one entrant, if it has one."""
        if key in self._open:
            self._open.pop(key)[1].close()

    def process(self, entrant: Entrant) -> Process:
        """The entrant's process, opened and warm."""
        if entrant.key not in self._open:
            stack = ExitStack()
            try:
                worker = stack.enter_context(Worker("tune", self._limits))
                process = Process(worker, entrant.artifact, self._cases[0], settings=entrant.settings)
                for case in self._cases:
                    process.take(case)
                    process.warm_up(_WARM_UP_SECONDS)
                process.rest()
            except BaseException:
                stack.close()
                raise
            self._open[entrant.key] = (process, stack)
        return self._open[entrant.key][0]

    def peak_rss_bytes(self, entrant: Entrant) -> int:
        """The most memory that the entrant's process held."""
        return int(self.process(entrant).costs()["peak_rss_bytes"])

    def round(self, entrants: Sequence[Entrant], rng: np.random.Generator) -> dict[str, Any]:
        """One round, as JSON: "ms" and, with a meter, "joules" per run, by key and case; "guard" before and after."""
        for entrant in entrants:
            self.process(entrant)
        ms: dict[str, list[list[float]]] = {e.key: [[] for _ in self._cases] for e in entrants}
        joules: dict[str, list[list[float]]] = {e.key: [[] for _ in self._cases] for e in entrants}
        before = self._guarded()
        for number, case in enumerate(self._cases):
            order = [entrants[i] for i in rng.permutation(len(entrants))]
            for entrant in [*order, *reversed(order)]:
                process = self.process(entrant)
                process.take(case)
                if self._meter:
                    self._meter.lap()
                times = process.time_block(self._slot)
                if self._meter:
                    joules[entrant.key][number].append(self._meter.lap() / len(times))
                ms[entrant.key][number] += medians([times[1:] or times])
                process.rest()
        return {"ms": ms, "joules": joules if self._meter else None, "guard": [before, self._guarded()]}

    def _guarded(self) -> float:
        if self._guard is None:
            self._guard = self._stack.enter_context(Worker("tune guard", self._limits, THREAD_LIMITS))
            self._guard.create("deploytool.bench.serve:Guard", threads=min(usable_cores(), _GUARD_THREADS))
        return float(self._guard.invoke("kernel"))


def undisturbed(rounds: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Rounds during which the guard stayed near its median; all of them where none did."""
    usual = float(np.median([time for r in rounds for time in r["guard"]])) if rounds else 1.0
    limit = math.log1p(GUARD_MOVED)
    return [r for r in rounds if all(abs(math.log(t / usual)) <= limit for t in r["guard"])] or list(rounds)


def log_ratios(rounds: Sequence[Mapping[str, Any]], key: str, anchor: str, unit: str = "ms") -> list[float]:
    """Per undisturbed round that both took part in: ln(anchor / entrant), averaged over the cases. Above 0: better."""
    return [float(np.mean(ratios)) for ratios in _ratios(rounds, key, anchor, unit)]


def case_log_ratios(
    rounds: Sequence[Mapping[str, Any]], key: str, anchor: str, case: int, unit: str = "ms"
) -> list[float]:
    """The same for one case alone."""
    return [ratios[case] for ratios in _ratios(rounds, key, anchor, unit)]


def _ratios(rounds: Sequence[Mapping[str, Any]], key: str, anchor: str, unit: str) -> list[list[float]]:
    both = [r for r in rounds if key in r[unit] and anchor in r[unit]]
    return [[_log(a) - _log(e) for e, a in zip(r[unit][key], r[unit][anchor], strict=True)] for r in undisturbed(both)]


def short(rounds: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether an entrant's runs are so short that their time depends on the process, of which it needs several."""
    return min(per_case(rounds, key)) < SHORT_MS


def _log(values: Sequence[float]) -> float:
    return float(np.mean(np.log(np.maximum(values, 1e-12))))


def per_case(rounds: Sequence[Mapping[str, Any]], key: str, unit: str = "ms") -> list[float]:
    """The median per case over the undisturbed rounds that the entrant took part in."""
    own = undisturbed([r for r in rounds if key in r[unit]])
    return [float(np.median([t for r in own for t in r[unit][key][case]])) for case in range(len(own[0][unit][key]))]

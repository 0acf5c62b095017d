#!/usr/bin/env python
"""False alarms and found slowdowns of the comparison, on traces of a disturbed machine; beside the usual way.

Four regimes: idle, one core busy, memory traffic, bursts. Traces are simulated (any number, no machine needed) or
recorded here (`--record FILE`: two processes that run the same two-threaded work, in blocks, while this script makes
the disturbance; then `--replay FILE`). A recorded comparison is all blocks of one session, and where it is confirmed of
another, with the sides of a whole session swapped at random, so that what one process has over the other stays in it.
With at least two sessions for each comparison each is used once for equal programs and once for the slower one
(`"resampled": false`); with fewer they are drawn again and again, each time begun at another block.

The same sessions are also judged the usual way: the mean of 20 runs of each, one after the other, and a threshold of
2 %. Prints JSON.

    python scripts/bench/timing_aa.py --trials 75 > simulated.json
    python scripts/bench/timing_aa.py --record traces.json && python scripts/bench/timing_aa.py --replay traces.json
    python scripts/bench/timing_aa.py --record traces.json --sessions 150 # about two hours
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.bench.blocks import Block, measure
from deploytool.bench.compare import judged
from deploytool.bench.environment import environment
from deploytool.bench.serve import THREAD_LIMITS, Guard

REGIMES = ("idle", "one core busy", "memory traffic", "bursts")
BUDGET_SECONDS = 12.0  # with which no comparison takes over a minute, overtime and confirmation included
OPENING_SECONDS, RESTING_SECONDS = 1.0, 0.1  # of a simulated engine: to open it, and until its threads sleep
USUAL_RUNS, USUAL_THRESHOLD = 20, 0.02
SESSIONS, BLOCKS, SLOT_SECONDS = 6, 24, 0.1
RESTART = 0.004  # standard deviation of what a restart changes, as ln(time); recorded sessions have their own


class Machine:
    """A simulated machine: a clock, and how much slower everything is at a time."""

    def __init__(self, regime: str, seed: int):
        self.now = 0.0
        self._rng = np.random.default_rng([seed, REGIMES.index(regime)])
        self._regime = regime
        self._level = 0.0
        self._until = self._rng.exponential(2.0)
        self._burst = 1.0

    def slowness(self) -> float:
        """The factor at this moment; what is random in it is drawn per run."""
        rng = self._rng
        drift = 1 + 0.01 * math.sin(self.now / 7)
        if self._regime == "idle":
            return drift * math.exp(0.006 * rng.standard_normal())
        if self._regime == "one core busy":  # now and then the neighbour sits on one of our two cores
            return drift * (1.0 if rng.random() < 0.6 else 1 + 0.8 * rng.random())
        if self._regime == "memory traffic":
            self._level = 0.98 * self._level + 0.02 * rng.standard_normal()
            return drift * 1.2 * math.exp(0.5 * self._level + 0.02 * rng.standard_normal())
        if self.now > self._until:
            calm = self._burst > 1
            self._burst = 1.0 if calm else 1.3 + 2 * rng.random()
            self._until = self.now + rng.exponential(2.0 if calm else 0.4)
        return drift * self._burst * math.exp(0.006 * rng.standard_normal())

    def spend(self, seconds: float) -> float:
        """Milliseconds that so much work takes now."""
        taken = seconds * self.slowness()
        self.now += taken
        return taken * 1e3

    def clock(self) -> float:
        return self.now


class Program:
    """Work of some milliseconds on a simulated machine."""

    def __init__(self, machine: Machine, milliseconds: float):
        self._machine, self._seconds = machine, milliseconds / 1e3

    def time_block(self, seconds: float) -> list[float]:
        end, times = self._machine.now + seconds, []
        while not times or self._machine.now < end:
            times.append(self._machine.spend(self._seconds))
        return times

    def rest(self) -> None:
        self._machine.now += RESTING_SECONDS


class Simulated:
    """A session on a simulated machine: each measurement has new processes; `seconds` is all that it took."""

    def __init__(self, regime: str, slowdown: float, seed: int):
        self.seconds = 0.0
        self._machine = Machine(regime, seed)
        self._rng = np.random.default_rng([seed, 99])
        self._slowdown = slowdown
        self._first: tuple[Program, Program] | None = None

    def say(self, line: str) -> None:
        pass

    def programs(self) -> tuple[Program, Program]:
        """The candidate, slower by what is planted, and the reference; each with a restart of its own."""
        first, second = np.exp(RESTART * self._rng.standard_normal(2))
        return Program(self._machine, 8 * first * (1 + self._slowdown)), Program(self._machine, 8 * second)

    def measure(self, references: Mapping[str, Any], seed: int) -> tuple[list[Block], dict[str, Any], dict[str, Any]]:
        candidate, reference = programs = self.programs()
        self._first = self._first or programs
        self._machine.now += 3 * OPENING_SECONDS  # the guard has a process too
        for program in programs:
            program.time_block(0.05 * BUDGET_SECONDS)
            program.rest()
        guard = Program(self._machine, 2.0)
        blocks = measure(candidate, {"r": reference}, lambda: float(np.median(guard.time_block(0.008))),
                         budget_seconds=BUDGET_SECONDS, seed=seed, clock=self._machine.clock)  # fmt: skip
        self.seconds = self._machine.now
        return blocks, {"": {}, "r": {}}, {}

    def usual(self) -> tuple[list[float], list[float]]:
        """Runs of the one, then runs of the other, of the processes that were measured first."""
        assert self._first
        candidate, reference = self._first
        return ([candidate.time_block(0.0)[0] for _ in range(USUAL_RUNS)],
                [reference.time_block(0.0)[0] for _ in range(USUAL_RUNS)])  # fmt: skip


class Replayed:
    """A session made of recorded blocks; `slowdown` is planted in the candidate's times.

    With `once` it has two recorded sessions of its own, the second for a confirmation; else any, begun anywhere.
    """

    def __init__(self, sessions: Sequence[Sequence[Mapping[str, Any]]], slowdown: float, seed: int, once: bool = False):
        self._rng = np.random.default_rng([seed, 7])
        self._sessions = sessions
        self._own = iter(sessions[2 * seed : 2 * seed + 2]) if once else None
        self._first: tuple[list[float], list[float]] | None = None
        self._slowdown = 1 + slowdown
        self.seconds = 0.0

    def say(self, line: str) -> None:
        pass

    def stretch(self) -> list[tuple[list[list[float]], list[list[float]], tuple[float, float], str]]:
        """Blocks of one session, with its sides swapped or not; where it is drawn, from any on and around its end."""
        session = next(self._own) if self._own else self._sessions[self._rng.integers(len(self._sessions))]
        start, swap = int(self._rng.integers(len(session))), bool(self._rng.integers(2))
        start = 0 if self._own else start
        found = []
        for block in [*session[start:], *session[:start]]:
            a, b = (block["b"], block["a"]) if swap else (block["a"], block["b"])
            order = {"ABBA": "BAAB", "BAAB": "ABBA"}[block["order"]] if swap else block["order"]
            found.append(([[t * self._slowdown for t in slot] for slot in a], b, tuple(block["guard"]), order))
        return found

    def measure(self, references: Mapping[str, Any], seed: int) -> tuple[list[Block], dict[str, Any], dict[str, Any]]:
        stretch = self.stretch()
        a, b, _, _ = stretch[0]
        self._first = self._first or ([*a[0], *a[1]], [*b[0], *b[1]])
        blocks = [Block("r", order, tuple(map(tuple, a)), tuple(map(tuple, b)), guard)  # type: ignore[arg-type]
                  for a, b, guard, order in stretch]  # fmt: skip
        self.seconds += sum(map(running, blocks))
        return blocks, {"": {}, "r": {}}, {}

    def usual(self) -> tuple[list[float], list[float]]:
        """Runs of the one and of the other, of the first block that was measured: of two slots where one has fewer."""
        assert self._first
        return self._first[0][:USUAL_RUNS], self._first[1][:USUAL_RUNS]


def running(block: Block) -> float:
    """Seconds of a block's runs; what processes wait for in between is not recorded."""
    return sum(sum(slot) for slot in (*block.candidate_ms, *block.reference_ms)) / 1e3


def usual_verdict(candidate: Sequence[float], reference: Sequence[float]) -> str:
    """The mean of each, and a threshold."""
    ratio = float(np.mean(reference) / np.mean(candidate))
    return "faster" if ratio > 1 + USUAL_THRESHOLD else "slower" if ratio < 1 / (1 + USUAL_THRESHOLD) else "same"


def count(make: Callable[[str, float, int], Any], trials: int, slowdown: float) -> dict[str, Any]:
    """Verdicts per regime, ours and the usual ones."""
    found: dict[str, Any] = {}
    for regime in REGIMES:
        ours: Counter[str] = Counter()
        usual: Counter[str] = Counter()
        seconds = []
        for seed in range(trials):
            session = make(regime, slowdown, seed)
            result = judged(session, {"r": None}, seed)
            seconds.append(session.seconds)
            ours[result["against"]["r"]["verdict"]] += 1
            usual[usual_verdict(*session.usual())] += 1
        found[regime] = {"ours": dict(ours), "usual": dict(usual),
                         "seconds_each": {"median": float(np.median(seconds)), "most": max(seconds)}}  # fmt: skip
        print(f"{slowdown:.0%} {regime}: {found[regime]}", file=sys.stderr)
    return found


def told(found: Mapping[str, Any], trials: int, way: str, verdicts: Sequence[str]) -> float:
    """The share of all comparisons with one of these verdicts."""
    return sum(r[way].get(v, 0) for r in found.values() for v in verdicts) / (trials * len(REGIMES))


def compared(make: Callable[[str, float, int], Any], trials: int) -> dict[str, Any]:
    """A/A and a planted slowdown of 3 %."""
    equal, slower = count(make, trials, 0.0), count(make, trials, 0.03)
    return {
        "comparisons": trials * len(REGIMES), "equal": equal, "three_percent": slower,
        "false_alarms": {way: told(equal, trials, way, ("faster", "slower")) for way in ("ours", "usual")},
        "found_or_undecided": {way: told(slower, trials, way, ("slower", "undecided")) for way in ("ours", "usual")},
        "found": {way: told(slower, trials, way, ("slower",)) for way in ("ours", "usual")},
        "called_faster": {way: told(slower, trials, way, ("faster",)) for way in ("ours", "usual")},
    }  # fmt: skip


def disturb(regime: str) -> None:
    """What runs beside the recording, until it is ended."""
    block = np.ones(32_000_000, dtype=np.float64) if regime == "memory traffic" else None
    rng = np.random.default_rng(0)
    while True:
        if block is not None:
            block += 1.0
        elif regime == "bursts":
            time.sleep(float(rng.exponential(1.5)))
            end = time.monotonic() + float(rng.uniform(0.1, 0.6))
            while time.monotonic() < end:
                pass


def served(pipe: Any) -> None:
    """A process that runs the work for as long as it is told, and answers with milliseconds per run."""
    work = Guard(threads=min(2, os.cpu_count() or 1), size=256, products=8)
    while (seconds := pipe.recv()) is not None:
        times, end = [], time.monotonic() + seconds
        while not times or time.monotonic() < end:
            times.append(work.kernel(repeats=1))
        pipe.send(times)


def record(path: Path, sessions: int, blocks: int) -> None:
    """Record A/A sessions of every regime; each has processes of its own."""
    context = multiprocessing.get_context("spawn")
    guard = Guard(threads=min(2, os.cpu_count() or 1))
    traces: dict[str, list[list[dict[str, Any]]]] = {}
    for regime in REGIMES:
        other = None if regime == "idle" else context.Process(target=disturb, args=(regime,), daemon=True)
        if other:
            other.start()
        traces[regime] = [_session(context, guard, blocks, seed) for seed in range(sessions)]
        if other:
            other.kill()
        print(f"recorded {regime}", file=sys.stderr)
    path.write_text(json.dumps({"environment": environment(), "traces": traces}))


def _session(context: Any, guard: Guard, blocks: int, seed: int) -> list[dict[str, Any]]:
    pipes, processes = {}, []
    for side in "ab":
        pipes[side], inner = context.Pipe()
        processes.append(context.Process(target=served, args=(inner,), daemon=True))
        processes[-1].start()
        pipes[side].send(0.5)
        pipes[side].recv()
    rng, found = np.random.default_rng(seed), []
    before = guard.kernel()
    for _ in range(blocks):
        order = "ABBA" if rng.integers(2) == 0 else "BAAB"
        slots: dict[str, list[list[float]]] = {"a": [], "b": []}
        for side in order.lower():
            pipes[side].send(SLOT_SECONDS)
            times = pipes[side].recv()
            slots[side].append(times[1:] or times)
        after = guard.kernel()
        found.append({"order": order, **slots, "guard": [before, after]})
        before = after
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join(5)
    return found


def main() -> None:
    """Parse and do what was asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=75, help="per regime, for equal programs and for slower ones")
    parser.add_argument("--record", type=Path)
    parser.add_argument("--sessions", type=int, default=SESSIONS, help="with --record: how many of each disturbance")
    parser.add_argument("--replay", type=Path)
    given = parser.parse_args()
    if given.record:
        if any(os.environ.get(name) != value for name, value in THREAD_LIMITS.items()):
            subprocess.run([sys.executable, __file__, *sys.argv[1:]], env=os.environ | THREAD_LIMITS, check=True)
        else:
            record(given.record, given.sessions, BLOCKS)
    elif given.replay:
        data = json.loads(given.replay.read_text())
        traces = data["traces"]
        once = all(len(sessions) >= 2 * given.trials for sessions in traces.values())
        result = compared(lambda regime, slowdown, seed: Replayed(traces[regime], slowdown, seed, once), given.trials)
        about = {"traces": "recorded", "sessions": min(map(len, traces.values())), "resampled": not once}
        print(json.dumps({**about, "environment": data["environment"], **result}, indent=2))
    else:
        about = {"traces": "simulated", "budget_seconds": BUDGET_SECONDS}
        print(json.dumps({**about, **compared(Simulated, given.trials)}, indent=2))


if __name__ == "__main__":
    main()

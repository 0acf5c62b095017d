"""One artifact against others, each in a warmed process of its own, timed in interleaved blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deploytool.artifact import Artifact
from deploytool.backends.engine import threads_of
from deploytool.bench import environment as surroundings
from deploytool.bench.blocks import Block, measure, medians, undisturbed
from deploytool.bench.energy import GPU_KEY, Counter, counters_for, on_gpu
from deploytool.bench.serve import THREAD_LIMITS
from deploytool.bench.statistics import MIN_BLOCKS, percentile, runs_needed, speedup, spread, sure_percentile
from deploytool.worker import Limits, Worker

_WARM_UP_SHARE = 0.05
_WARM_UP_SECONDS = 1.0
_WARM_UP_RUNS = 10_000
_GUARD_THREADS = 8
SHORT_MS = 2.0  # runs shorter than this depend on the process: where its memory and its threads happen to lie
_SURE, _SURE_SHORT = 0.10, 1.0  # a difference this large is not of one process alone, nor of one with short runs
_OPENER = "deploytool.backends.base:open_as_used"
_NO_COUNTERS: Mapping[str, Counter | None] = {}


class Process:
    """An artifact that is opened and warm in a child process; the child waits on a pipe while others are timed."""

    def __init__(
        self, worker: Worker, artifact: Artifact, case: Path, opener: str = _OPENER,
        settings: Mapping[str, Any] | None = None, counters: Mapping[str, Counter | None] = _NO_COUNTERS,
    ):  # fmt: skip
        self._worker = worker
        self._counters = {key: counter for key, counter in counters.items() if counter}
        self._joules: dict[str, list[float]] = {key: [] for key in counters}
        artifact = replace(artifact, settings={**artifact.settings, **(settings or {})})
        self._threads = None if on_gpu(artifact) else threads_of(artifact)
        worker.create("deploytool.bench.serve:Served", folder=str(artifact.folder.absolute()),
                      case=str(case.absolute()), settings=dict(settings or {}), opener=opener)  # fmt: skip
        self.loading: dict[str, float] = worker.invoke("loading")
        self.pid = worker.pid

    def take(self, case: Path) -> None:
        """Run the inputs of another case from now on."""
        self._worker.invoke("take", case=str(case.absolute()))

    def warm_up(self, seconds: float) -> None:
        self._worker.invoke("warm_up", seconds=seconds, max_runs=_WARM_UP_RUNS)

    def time_block(self, seconds: float) -> list[float]:
        for counter in self._counters.values():
            counter.lap()
        times: list[float] = self._worker.invoke("time_block", seconds=seconds)
        for key, counter in self._counters.items():
            self._joules[key].append(counter.lap() / len(times))
        return times

    def rest(self) -> None:
        self._worker.invoke("rest")

    def costs(self) -> dict[str, Any]:
        """threads, load_s, cold_start_ms, peak_rss_bytes, device_ms, and of each counter the median turn per run, or
        None."""
        joules = {key: float(np.median(seen)) if seen else None for key, seen in self._joules.items()}
        told = {**self.loading, **self._worker.invoke("memory"), **self._worker.invoke("device")}
        return {"threads": self._threads, **told, **joules}


def compare(
    candidate: Artifact,
    references: Mapping[str, Artifact],
    case: Path,
    *,
    limits: Limits,
    budget_seconds: float,
    seed: int,
    report: Callable[[str], None] | None = None,
    opener: str = _OPENER,
) -> dict[str, Any]:
    """Time `candidate` and each reference on the inputs of `case`; the result is JSON.

    Keys: p50_ms, p90_ms and p99_ms (estimates, with a note, where more runs would make them sure), p90_sure_ms and
    p99_sure_ms (bounds, or None), runs, blocks, disturbed_blocks, threads (of the engine; None where it runs on a GPU),
    load_s, cold_start_ms, peak_rss_bytes, device_ms (of the GPU alone; None on CPUs), joules_per_run and
    gpu_joules_per_run (None where the environment's "energy" and "gpu_energy" say why), environment, notes,
    block_medians_ms per reference, and `against`: per reference its own
    p50_ms, threads, load_s, cold_start_ms, peak_rss_bytes, device_ms, joules_per_run, gpu_joules_per_run, and speedup
    (reference time over candidate time), speedup_ci (95 %; None below five undisturbed blocks, which decide nothing),
    speedup_range (the lowest and highest ratio of the blocks), verdict, confirmed.

    A difference below a tenth, and of runs shorter than SHORT_MS one below the double, is claimed only when a second
    measurement in fresh processes, of the same budget, shows it too: another layout of memory alone can make a program
    a few percent slower, and where its threads lie can make a short run a third slower. Then `confirmed` says whether
    it did, and figures are of all blocks.

    `budget_seconds` is for timing; opening and warming come on top, and when blocks are slow or disturbed it may take
    twice that. `limits` hold for each call into each process. Raises BackendFailed when a process crashes, hangs or
    outgrows its memory, and whatever opening or running the artifact raises.
    """
    session = _Session(candidate, case, limits, budget_seconds, report or (lambda _: None), opener)
    return judged(session, references, seed)


def headline(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Of the figures against one reference, those that a report repeats at the top of its speed."""
    return {key: figures[key] for key in ("speedup", "speedup_ci", "speedup_range", "verdict")}


class Session(Protocol):
    """Something that measures in fresh processes each time it is asked, and says what goes on."""

    def measure(
        self, references: Mapping[str, Any], seed: int
    ) -> tuple[list[Block], dict[str, dict[str, Any]], dict[str, Any]]:
        """Blocks, what each process cost (the candidate under ""), and the environment."""
        ...

    def say(self, line: str) -> None:
        """Progress."""
        ...


def judged(session: Session, references: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Measure, and measure small claims again in fresh processes: see `compare`."""
    blocks, costs, environment = session.measure(references, seed)
    first = summarize(blocks, costs, seed=seed)
    close = {name: references[name] for name, figures in first["against"].items() if _close(first, figures)}
    if not close:
        return first | {"seed": seed, "environment": environment}
    session.say(f"confirming in fresh processes: {', '.join(close)}")
    again, _, _ = session.measure(close, seed + 1)
    second = summarize(again, {name: costs[name] for name in ("", *close)}, seed=seed)
    whole = summarize([*blocks, *again], costs, seed=seed)
    for name in close:
        _confirm(whole, name, first["against"][name], second["against"][name])
    return whole | {"seed": seed, "environment": environment}


class _Session:
    """What stays the same between the measurement and its confirmation."""

    def __init__(
        self, candidate: Artifact, case: Path, limits: Limits, budget_seconds: float, say: Callable[[str], None],
        opener: str,
    ):  # fmt: skip
        self._candidate, self._case, self._limits, self._budget = candidate, case, limits, budget_seconds
        self._opener = opener
        self._say = say

    def say(self, line: str) -> None:
        self._say(line)

    def measure(
        self, references: Mapping[str, Artifact], seed: int
    ) -> tuple[list[Block], dict[str, dict[str, Any]], dict[str, Any]]:
        """Blocks of new processes, what each process cost (the candidate under ""), and the environment."""
        with ExitStack() as stack:
            guard = stack.enter_context(Worker("bench guard", self._limits, THREAD_LIMITS))
            threads = _guard_threads([self._candidate, *references.values()])
            guard.create("deploytool.bench.serve:Guard", threads=threads)
            opened: dict[str, Process] = {}
            artifacts = {"": self._candidate, **references}
            counters, energy = counters_for(artifacts.values())
            for name, artifact in artifacts.items():
                self.say(f"opening {name or 'the candidate'}")
                worker = stack.enter_context(Worker(f"bench {name or 'candidate'}", self._limits))
                own = counters if on_gpu(artifact) else {**counters, GPU_KEY: None}
                opened[name] = Process(worker, artifact, self._case, self._opener, counters=own)
            for process in opened.values():
                process.warm_up(min(_WARM_UP_SECONDS, _WARM_UP_SHARE * self._budget))
                process.rest()
            environment = {**surroundings.environment(), **energy}
            pids = [guard.pid, *(p.pid for p in opened.values())]
            start = surroundings.usage(pids)
            others = {name: opened[name] for name in references}
            blocks = measure(opened[""], others, lambda: float(guard.invoke("kernel")),
                             budget_seconds=self._budget, seed=seed, report=self.say)  # fmt: skip
            environment |= surroundings.between(start, surroundings.usage(pids))
            return blocks, {name: process.costs() for name, process in opened.items()}, environment


def _close(candidate: Mapping[str, Any], figures: Mapping[str, Any]) -> bool:
    """Whether a claim is so small that it could be of these processes alone."""
    sure = _SURE_SHORT if min(candidate["p50_ms"], figures["p50_ms"]) < SHORT_MS else _SURE
    return figures["verdict"] in ("faster", "slower") and abs(math.log(figures["speedup"])) < math.log1p(sure)


def _confirm(whole: dict[str, Any], name: str, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Keep the claim of the first measurement only when the second one's interval lies on the same side of 1."""
    low, high = second["speedup_ci"] or (0.0, math.inf)
    seen = low > 1 if first["verdict"] == "faster" else high < 1
    figures = whole["against"][name]
    figures["confirmed"] = bool(seen)
    figures["verdict"] = figures["verdict"] if seen and figures["verdict"] == first["verdict"] else "undecided"
    if not seen:
        whole["notes"].append(f"against {name}: {first['verdict']} ({first['speedup']:.3f}x) was not seen again in "
                              f"fresh processes ({second['speedup']:.3f}x): undecided")  # fmt: skip


def _guard_threads(artifacts: Sequence[Artifact]) -> int:
    """As many as the widest engine uses: a neighbour on any of its cores must show."""
    cores = surroundings.usable_cores()
    asked = [int(a.settings.get("threads") or 0) or cores for a in artifacts]
    return max(1, min(cores, _GUARD_THREADS, max(asked)))


def summarize(blocks: Sequence[Block], costs: Mapping[str, Mapping[str, Any]], *, seed: int) -> dict[str, Any]:
    """The result of the blocks; `costs` holds what each process cost, the candidate under "".

    Where every block was disturbed, times are told from all of them, but nothing is decided.
    """
    quiet = undisturbed(blocks)
    used = quiet or list(blocks)
    own = [t for b in used for slots in _own_slots(b) for t in slots]
    names = [name for name in costs if name]
    notes = []
    if len(quiet) < len(blocks):
        notes.append(f"{len(blocks) - len(quiet)} of {len(blocks)} blocks were disturbed and "
                     + ("not used" if quiet else "that is all: times are of disturbed blocks"))  # fmt: skip
    notes += [f"{label} is an estimate: {runs_needed(share)} runs make it sure (got {len(own)})"
              for label, share in (("p90", 0.9), ("p99", 0.99)) if len(own) < runs_needed(share)]  # fmt: skip
    against = {name: _against([b for b in blocks if b.reference == name], quiet, seed) | dict(costs[name])
               for name in names}  # fmt: skip
    notes += [f"against {name}: undecided, {a['blocks']} undisturbed blocks (a verdict needs {MIN_BLOCKS}); its "
              "figures are of all blocks" for name, a in against.items() if a["blocks"] < MIN_BLOCKS]  # fmt: skip
    return {
        **_times(own),
        **costs[""],
        "blocks": len(quiet),
        "disturbed_blocks": len(blocks) - len(quiet),
        "against": against,
        "block_medians_ms": {name: _raw(name, blocks, quiet) for name in names or [""]},
        "notes": notes,
    }


def _own_slots(block: Block) -> tuple[tuple[float, ...], ...]:
    """The candidate's slots; it stood on both sides when it had no reference."""
    return block.candidate_ms if block.reference else block.candidate_ms + block.reference_ms


def _times(samples: Sequence[float]) -> dict[str, Any]:
    return {
        "p50_ms": medians([samples])[0],
        "p90_ms": percentile(samples, 0.90),
        "p99_ms": percentile(samples, 0.99),
        "p90_sure_ms": sure_percentile(samples, 0.90),
        "p99_sure_ms": sure_percentile(samples, 0.99),
        "runs": len(samples),
    }


def _against(blocks: Sequence[Block], quiet: Sequence[Block], seed: int) -> dict[str, Any]:
    """The figures of one reference from its blocks; `quiet` are the undisturbed ones of all references.

    Too few undisturbed blocks decide nothing: then all blocks are told, with no interval.
    """
    own = [b for b in blocks if b in quiet]
    found = speedup([b.log_ratio for b in own], seed=seed)
    told = own if found else blocks
    seen = spread([b.log_ratio for b in told])
    return {
        **_times([t for b in told for slot in b.reference_ms for t in slot]),
        "blocks": len(own),
        "speedup": found.value if found else seen.value,
        "speedup_ci": [found.low, found.high] if found else None,
        "speedup_range": [seen.low, seen.high],
        "verdict": found.verdict() if found else "undecided",
        "confirmed": None,
    }


def _raw(name: str, blocks: Sequence[Block], quiet: Sequence[Block]) -> list[dict[str, Any]]:
    used = {id(b) for b in quiet}
    return [
        {"order": b.order, "candidate": medians(b.candidate_ms), "reference": medians(b.reference_ms),
         "guard": list(b.guard_ms), "used": id(b) in used}
        for b in blocks if b.reference == name
    ]  # fmt: skip

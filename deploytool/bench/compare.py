"""One artifact against others, each in a warmed process of its own, timed in interleaved blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.bench import environment as surroundings
from deploytool.bench.blocks import Block, measure, medians, undisturbed
from deploytool.bench.serve import THREAD_LIMITS
from deploytool.bench.statistics import MIN_BLOCKS, percentile, runs_needed, speedup, spread
from deploytool.worker import Limits, Worker

_WARM_UP_SHARE = 0.05
_WARM_UP_SECONDS = 1.0
_WARM_UP_RUNS = 10_000
_GUARD_THREADS = 8
_OPENER = "deploytool.backends.base:open_artifact"


class Process:
    """An artifact that is opened and warm in a child process; the child waits on a pipe while others are timed."""

    def __init__(
        self, worker: Worker, artifact: Artifact, case: Path, opener: str = _OPENER,
        settings: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        self._worker = worker
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
        times: list[float] = self._worker.invoke("time_block", seconds=seconds)
        return times

    def rest(self) -> None:
        self._worker.invoke("rest")

    def costs(self) -> dict[str, Any]:
        """load_s, cold_start_ms and peak_rss_bytes."""
        return {**self.loading, **self._worker.invoke("memory")}


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

    Keys: p50_ms, p90_ms and p99_ms (estimates, with a note, where more runs would make them sure), runs, blocks,
    disturbed_blocks, load_s, cold_start_ms, peak_rss_bytes, environment, notes, block_medians_ms per reference,
    and `against`: per reference its own p50_ms, load_s, cold_start_ms, peak_rss_bytes, and speedup (reference time
    over candidate time),
    speedup_ci (95 %; below five undisturbed blocks the lowest and highest seen, and nothing is decided), verdict.

    `budget_seconds` is for timing; opening and warming come on top, and when blocks are slow or disturbed it may take
    twice that. `limits` hold for each call into each process. Raises BackendFailed when a process crashes, hangs or
    outgrows its memory, and whatever opening or running the artifact raises.
    """
    say = report or (lambda _: None)
    with ExitStack() as stack:
        guard = stack.enter_context(Worker("bench guard", limits, THREAD_LIMITS))
        guard.create("deploytool.bench.serve:Guard", threads=_guard_threads([candidate, *references.values()]))
        opened: dict[str, Process] = {}
        for name, artifact in {"": candidate, **references}.items():
            say(f"opening {name or 'the candidate'}")
            worker = stack.enter_context(Worker(f"bench {name or 'candidate'}", limits))
            opened[name] = Process(worker, artifact, case, opener)
        for process in opened.values():
            process.warm_up(min(_WARM_UP_SECONDS, _WARM_UP_SHARE * budget_seconds))
            process.rest()
        environment = surroundings.environment()
        pids = [guard.pid, *(p.pid for p in opened.values())]
        start = surroundings.usage(pids)
        others = {name: opened[name] for name in references}
        blocks = measure(opened[""], others, lambda: float(guard.invoke("kernel")),
                         budget_seconds=budget_seconds, seed=seed, report=report)  # fmt: skip
        environment |= surroundings.between(start, surroundings.usage(pids))
        costs = {name: process.costs() for name, process in opened.items()}
    return summarize(blocks, costs, seed=seed) | {"seed": seed, "environment": environment}


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
        notes.append(f"{len(blocks) - len(quiet)} of {len(blocks)} blocks were disturbed and not used"
                     + ("" if quiet else ", which is all: times are of disturbed blocks"))  # fmt: skip
    notes += [f"{label} is an estimate: {runs_needed(share)} runs make it sure (got {len(own)})"
              for label, share in (("p90", 0.9), ("p99", 0.99)) if len(own) < runs_needed(share)]  # fmt: skip
    against = {name: _against([b for b in blocks if b.reference == name], quiet, seed) | dict(costs[name])
               for name in names}  # fmt: skip
    notes += [f"against {name}: undecided, {a['blocks']} undisturbed blocks (a verdict needs {MIN_BLOCKS})"
              for name, a in against.items() if a["blocks"] < MIN_BLOCKS]  # fmt: skip
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
        "runs": len(samples),
    }


def _against(blocks: Sequence[Block], quiet: Sequence[Block], seed: int) -> dict[str, Any]:
    """The figures of one reference from its blocks; `quiet` are the undisturbed ones of all references.

    Too few undisturbed blocks decide nothing: then all blocks are told, with the lowest and highest ratio seen.
    """
    own = [b for b in blocks if b in quiet]
    found = speedup([b.log_ratio for b in own], seed=seed)
    told = own if found else blocks
    seen = found or spread([b.log_ratio for b in told])
    return {
        **_times([t for b in told for slot in b.reference_ms for t in slot]),
        "blocks": len(own),
        "speedup": seen.value,
        "speedup_ci": [seen.low, seen.high],
        "verdict": found.verdict() if found else "undecided",
    }


def _raw(name: str, blocks: Sequence[Block], quiet: Sequence[Block]) -> list[dict[str, Any]]:
    used = {id(b) for b in quiet}
    return [
        {"order": b.order, "candidate": medians(b.candidate_ms), "reference": medians(b.reference_ms),
         "guard": list(b.guard_ms), "used": id(b) in used}
        for b in blocks if b.reference == name
    ]  # fmt: skip

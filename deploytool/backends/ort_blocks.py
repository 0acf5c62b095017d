"""How wide the groups of weight-only products are, and what they compute with, by measuring on this machine.

Every candidate is the whole graph, one beside the first at a time: products of one token read all weights from memory,
which a single layer, held in the processor's cache, would not show.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from deploytool.backends.base import Request
from deploytool.backends.measured import MEASURED, measured, opened_with
from deploytool.backends.onnxruntime import ENTRY, SessionRunner, open_session
from deploytool.backends.ort_profile import rest
from deploytool.backends.tables import ACCURACY_LEVELS, GROUPS, OnnxRuntimeBuild
from deploytool.decoding import decodes
from deploytool.difference import Difference, error_max
from deploytool.errors import BackendFailed, InputRefused
from deploytool.signature import Feeds
from deploytool.target import Limits

TAKEN, OUTSIDE, SLOWER, NO_QUICKER = "taken", "outside the limits", "slower", "as quick, and less exact"
_MARGIN = 0.02  # smaller differences are not claimed: the more exact one is taken
_TURNS, _LEAST_TURNS = 11, 3
_HOPELESS = 0.5  # of the quickest so far: what is slower than this after a few turns is not timed on
_SLOT_SECONDS = 0.25
_LEAST_RUNS, _MOST_RUNS = 3, 50


@dataclass(frozen=True)
class Candidate:
    """One way to store the weights, and to multiply by them."""

    group: int
    activations: str


def wanted(options: OnnxRuntimeBuild) -> bool:
    """Whether anything is to be measured."""
    return MEASURED in (options.group, options.activations)


def measured_blocks(
    request: Request, options: OnnxRuntimeBuild, write: Callable[[Candidate, Path], None], *, single_rows: bool
) -> dict[str, Any]:
    """What every candidate costs and loses, and the one that is `taken`: the quickest within the profile's limits.

    `write` makes a candidate's graph in a folder. Of candidates whose turns' middle halves come within 2 % of those of
    the quickest, the most exact is taken: noise buys no precision.

    cpu, threads, seconds   where and how long it was measured
    candidates              group, activations, ms of the first recorded case (of a language model one token after its
                            past), speed beside the first candidate's with its quartiles over the turns, sqnr_db,
                            cosine, agreement and kl on the recorded cases, the decision

    Raises InputRefused DT310 where no candidate keeps to the limits, DT303 without recorded outputs.
    """
    groups = GROUPS if options.group == MEASURED else (int(options.group),)
    levels = tuple(ACCURACY_LEVELS)[::-1] if options.activations == MEASURED else (options.activations,)
    settings = opened_with(request, options)

    def measure() -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="deploytool-", dir=request.out.parent) as folder:
            rows = list(_rows(request, [Candidate(*pair) for pair in product(groups, levels)], write, Path(folder),
                              settings, single_rows))  # fmt: skip
        return _decided(rows)

    return measured(request, settings, measure)


def _rows(
    request: Request, candidates: Sequence[Candidate], write: Callable[[Candidate, Path], None], work: Path,
    settings: Mapping[str, Any], single_rows: bool,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The figures of each candidate; the first that opens stays open, and the others are timed beside it."""
    feeds, first, group, best = next(iter(request.cases())), None, None, 1.0
    given = {key: value for key, value in settings.items() if key != "threads"}
    for candidate in candidates:
        folder = work / str(candidate.group)
        if candidate.group != group:
            folder.mkdir()
            write(candidate, folder)
            group = candidate.group
        else:
            _set_level(folder / ENTRY, candidate.activations)
        row = {"group": candidate.group, "activations": candidate.activations}
        try:
            session = open_session(folder / ENTRY, settings["threads"], **given)
            runner = SessionRunner(session, request.signature, single_rows=single_rows)
            row |= _figures(request, runner)
            first = first or runner
            times = _times(first, runner, feeds, best)
            best = max(best, times["speed"])
            yield row | times
        except BackendFailed as error:
            yield row | {"decision": f"not taken by ONNX Runtime: {error.message[:300]}"}


def _set_level(path: Path, activations: str) -> None:
    """Let the products of a graph compute in another way; their weights stay where they are."""
    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = ACCURACY_LEVELS[activations]
    path.write_bytes(model.SerializeToString())


def _figures(request: Request, runner: SessionRunner) -> dict[str, Any]:
    """The worst of any output on the recorded cases, and what of it is outside the profile's limits."""
    outputs = {spec.name: Difference(spec.name, bool(spec.shape) and spec.shape[0] == "batch")
               for spec in request.signature.outputs}  # fmt: skip
    count = 0
    for count, (feeds, exact) in enumerate(zip(request.cases(), request.references(), strict=False), 1):
        for name, array in runner.run(feeds).items():
            outputs[name].add(count - 1, exact.get(name), array)
    if not count:
        raise InputRefused("DT303", "recorded outputs must be there to choose by (got none)")
    found = [difference.summary() for difference in outputs.values()]
    divergences = [one["kl_mean"] for one in found if one["kl_mean"] is not None]
    agreements = [one["agreement"] for one in found if one["agreement"] is not None]
    figures = {"cosine": min(one["cosine"] for one in found), "sqnr_db": min(one["sqnr_db"] for one in found),
               "agreement": min(agreements, default=None), "kl": max(divergences, default=None)}  # fmt: skip
    limits = request.target.parity
    beyond = [problem for one in found for problem in one["problems"]] + _beyond(found, figures, limits)
    most = math.log1p(limits.metric_drop_max)  # what a text's loss grows by, were it the model's own
    if decodes(request.signature) and figures["kl"] is not None and figures["kl"] > most:
        beyond.append(f"divergence must be at most {most:.3g} nats")
    return {**figures, "beyond": beyond}


def _beyond(found: Sequence[Mapping[str, Any]], figures: Mapping[str, Any], limits: Limits) -> list[str]:
    """Which of the profile's limits on outputs do not hold, in words."""
    broken = {
        f"cosine must be at least {limits.cosine_min}": not figures["cosine"] >= limits.cosine_min,
        f"relative error must be at most {error_max(limits.cosine_min):.3g}":
            not max(one["relative_error"] for one in found) <= error_max(limits.cosine_min),
        f"largest absolute error must be at most {limits.max_abs}":
            limits.max_abs is not None and max(one["max_abs"] for one in found) > limits.max_abs,
        f"SQNR must be at least {limits.sqnr_db_min} dB":
            limits.sqnr_db_min is not None and figures["sqnr_db"] < limits.sqnr_db_min,
        f"share of equal decisions must be at least {limits.agreement_min}":
            None not in (limits.agreement_min, figures["agreement"]) and figures["agreement"] < limits.agreement_min,
    }  # fmt: skip
    return [words for words, is_broken in broken.items() if is_broken]


def _times(first: SessionRunner, other: SessionRunner, feeds: Feeds, best: float) -> dict[str, float]:
    """Milliseconds of the other, and how many times as fast as the first it is: medians and quartiles of turns.

    `best` is the highest speed so far.
    """
    if other is first:
        times = [_slot(first, feeds) for _ in range(_TURNS)]
        return {"ms": float(np.median(times)), "speed": 1.0, "speed_low": 1.0, "speed_high": 1.0}
    turns = []
    for turn in range(_TURNS):
        pair = {}
        for side in (first, other) if turn % 2 else (other, first):
            pair[side is other] = _slot(side, feeds)
            rest()
        turns.append((pair[True], pair[False] / pair[True]))
        if len(turns) >= _LEAST_TURNS and max(ratio for _, ratio in turns) < _HOPELESS * best:
            break
    low, middle, high = (float(share) for share in np.quantile([ratio for _, ratio in turns], [0.25, 0.5, 0.75]))
    return {"ms": float(np.median([ms for ms, _ in turns])), "speed": middle, "speed_low": low, "speed_high": high}


def _slot(runner: SessionRunner, feeds: Feeds) -> float:
    """Mean milliseconds of the quicker half of some runs, the first left out: what others take is only ever added."""
    times: list[float] = []
    end = time.perf_counter() + _SLOT_SECONDS
    while len(times) < _LEAST_RUNS or (time.perf_counter() < end and len(times) < _MOST_RUNS):
        start = time.perf_counter()
        runner.run(feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return float(np.mean(sorted(times[1:])[: len(times) // 2]))


def _decided(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows with their decisions, and the candidate that is taken."""
    within = [row for row in rows if row.get("beyond") == []]
    if not within:
        said = [f"group {row['group']}, {row['activations']}: {_why(row)}" for row in rows]
        raise InputRefused("DT310", "a candidate must keep to the profile's limits (none does)", detail=said,
                           fix="widen the limits, or choose more bits")  # fmt: skip
    quickest = max(within, key=lambda row: row["speed"])
    quick = [row for row in within if row["speed_high"] * (1 + _MARGIN) >= quickest["speed_low"]]
    taken = max(quick, key=lambda row: row["sqnr_db"])
    for row in rows:
        if "decision" not in row:
            row["decision"] = (TAKEN if row is taken else OUTSIDE if row["beyond"] else NO_QUICKER
                               if any(row is one for one in quick) else SLOWER)  # fmt: skip
    return {"taken": {key: taken[key] for key in ("group", "activations")}, "candidates": list(rows)}


def _why(row: Mapping[str, Any]) -> str:
    return "; ".join(row["beyond"]) if "beyond" in row else str(row["decision"])

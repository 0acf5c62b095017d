"""The best artifact for every size that is timed, and all of them packed as one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploytool.artifact import Artifact
from deploytool.bench.statistics import MARGIN, MIN_BLOCKS
from deploytool.bundle.manifest import Bucket, Manifest
from deploytool.bundle.pack import pack
from deploytool.tune.search import Search
from deploytool.tune.track import case_log_ratios
from deploytool.tune.trial import Trial, distinct

PACKED, PARTS = "packed", "parts"
_CANDIDATES = 2  # of each size
_ROUNDS = 8


def best_per_bucket(search: Search, chosen: Trial) -> list[Trial]:
    """Per bucket the quickest that keeps the quality; the chosen one where none is quicker by more than the margin.

    Those that looked quickest at one of the sizes run in rounds of their own against the chosen one: who is the best at
    one size may be far from the best of all together. All are of one model, or they could not be packed as one.
    """
    entrants = [chosen]
    for case in range(len(search.cases)):
        entrants += _quick_at(search, chosen, case)
    entrants = distinct(entrants, search.key)
    search.engine.clear()
    search.heat("buckets", entrants, _ROUNDS)
    return [max(entrants, key=lambda t: (_gain(search, t, chosen, case), t is chosen))
            for case in range(len(search.cases))]  # fmt: skip


def _quick_at(search: Search, chosen: Trial, case: int) -> list[Trial]:
    assert search.anchor is not None
    anchor = search.key(search.anchor)
    same = [t for t in search.valued() if t.config.recipe == chosen.config.recipe]
    same.sort(key=lambda t: -_median(case_log_ratios(search.rounds, search.key(t), anchor, case, search.unit)))
    found: list[Trial] = []
    for trial in same:
        if len(found) < _CANDIDATES and search.fit(trial):
            found.append(trial)
    return found


def _gain(search: Search, trial: Trial, chosen: Trial, case: int) -> float:
    """How much quicker than the chosen one, as ln; 0 where that is not shown."""
    ratios = case_log_ratios(search.rounds, search.key(trial), search.key(chosen), case, search.unit)
    gain = _median(ratios) if len(ratios) >= MIN_BLOCKS else 0.0
    return gain if gain > math.log1p(MARGIN) else 0.0


def _median(ratios: Sequence[float]) -> float:
    return float(np.median(ratios)) if len(ratios) else -math.inf


def write_packed(
    folder: Path, artifacts: Sequence[Artifact], sizes: Sequence[Mapping[str, int]], name: str
) -> Manifest:
    """The bundle `packed` with a table: `artifacts` are those of each of the `sizes`, the same ones several times."""
    table = [Bucket(sizes=dict(s), target=str(a.target["name"])) for s, a in zip(sizes, artifacts, strict=True)]
    variants = list({str(artifact.target["name"]): artifact for artifact in artifacts}.values())
    return pack(variants, folder / PACKED, name=name, version="0.1.0", overwrite=True, buckets=table)

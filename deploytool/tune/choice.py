"""Which of those that ran to the end is taken: the quickest, with the best plain artifacts as its measure.

What is quickest on average may be slower than an unquantized artifact in one bucket, and what is as quick as that one
loses quality for nothing: neither is chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploytool.bench.statistics import center, speedup
from deploytool.tune.track import case_log_ratios
from deploytool.tune.trial import Trial, value_of

TOLERATED = 0.02  # what counts as equally quick, as in the verdicts of `bench`
_FEW, _FAR = 3, math.log(1.2)  # rounds that are no sample yet, and how far behind each of them must show it


@dataclass(frozen=True)
class Standings:
    """How trials stand to each other in the rounds.

    rounds    as `Track.round` has them
    key       under what a trial is recorded there
    unit      "ms" or "joules"
    """

    rounds: Sequence[Mapping[str, Any]]
    key: Callable[[Trial], str]
    buckets: int
    unit: str
    seed: int

    def in_bucket(self, trial: Trial, other: Trial, bucket: int) -> list[float]:
        """Per round that both took part in: ln(the other's time / the trial's). Above 0: quicker."""
        return case_log_ratios(self.rounds, self.key(trial), self.key(other), bucket, self.unit)

    def quickest(self, trials: Sequence[Trial], anchor: Trial, bucket: int) -> list[Trial]:
        """The trials, the quickest in a bucket first; all of them raced with the anchor."""
        return sorted(trials, key=lambda t: -center(self.in_bucket(t, anchor, bucket)))

    def able(
        self, trials: Sequence[Trial], plains: Sequence[Trial], fit: Callable[[Trial], bool] = lambda trial: True
    ) -> list[Trial]:
        """Those that in no bucket lose to its own best plain one; where none of them fits, to the best of all buckets.

        `plains` are the best plain one of all buckets together, then that of each, or nothing.
        """
        for measure in (plains[1:], [*plains[:1]] * self.buckets):
            able = [t for t in trials if not self.loses(t, measure)]
            if any(map(fit, able)):
                return able
        return []

    def choice(self, entrants: Sequence[Trial], plains: Sequence[Trial]) -> Trial | None:
        """The best of the able entrants; of `plains`, as `able` takes them, one that is as quick."""
        left = self.able(entrants, plains)
        if not left:
            return None
        best = min(left, key=value_of)
        as_quick = [t for t in left if t in plains and value_of(t) - value_of(best) <= TOLERATED]
        return min(as_quick, key=value_of, default=best)

    def loses(self, trial: Trial, plains: Sequence[Trial]) -> bool:
        """Whether it is surely slower in a bucket than the plain one that is its measure there."""
        return any(surely_slower(self.in_bucket(trial, plain, bucket), self.seed)
                   for bucket, plain in enumerate(plains) if plain is not trial)  # fmt: skip


def surely_slower(log_ratios: Sequence[float], seed: int) -> bool:
    """Whether the rounds show it with 95 % confidence, however much slower: what is in doubt must not be shipped as the
    quicker one, so less evidence is wanted than for a verdict. Of few rounds all must show it to be far slower."""
    found = speedup(log_ratios, seed=seed)
    if found is None:
        return len(log_ratios) >= _FEW and max(log_ratios) < -_FAR
    return found.high < 1 and found.value < 1 / (1 + TOLERATED)

"""What samples of time say: percentiles with enough runs, a speed-up with its interval, and a verdict.

Pure NumPy. Times are milliseconds; a speed-up above 1 means that the candidate is faster than the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deploytool.errors import InputRefused

Verdict = Literal["faster", "same", "slower", "undecided"]

MARGIN = 0.02  # smaller differences are not claimed: another layout of memory can cost or gain as much
WIDEST = 2.0  # an interval whose ends lie further apart than this factor decides nothing, wherever it lies
CLAIM_CONFIDENCE = 0.99  # of the interval that must exclude 1 before a difference is claimed
MIN_BLOCKS = 5  # a bootstrap of fewer has too few distinct resamples for a 95 % interval
_TRIM = 0.2
_TRIM_FROM = 8  # blocks; the trimmed mean of fewer has an interval twice as wide as the mean's
_RESAMPLES = 4000
_NOTHING_TOLD = 20.0  # half of the widest interval of ln(ratio): resamples that are nearly equal know no bound


def positive(values: Sequence[float]) -> NDArray[np.float64]:
    """The values as an array; raises InputRefused when there are none, or one is not finite and above zero."""
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise InputRefused("DT313", "times must be measured (got no run at all)")
    if not np.all(np.isfinite(array)) or not np.all(array > 0):
        raise InputRefused("DT313", f"times must be finite and above zero (got {array[~(array > 0)][:3].tolist()})")
    return array


def runs_needed(share: float, confidence: float = 0.99) -> int:
    """Fewest runs from which a percentile is told, by the early-stopping rule of MLPerf Inference.

    With fewer, the chance that at most one run lies beyond the true percentile exceeds 1 - confidence, and the
    slowest runs seen say nothing about it: 64 for 0.9, 662 for 0.99.
    Source: the inference rules of MLCommons, appendix on early stopping (binomial tail, tolerance 0).
    """
    runs = 1
    while share**runs + runs * (1 - share) * share ** (runs - 1) > 1 - confidence:
        runs += 1
    return runs


def sure_percentile(samples_ms: Sequence[float], share: float, confidence: float = 0.99) -> float | None:
    """A time that the percentile is below with the given confidence, in ms; None with fewer than `runs_needed`.

    As many of the slowest runs are left out as may be for that confidence, and the slowest of the rest is told: with
    t runs above the true percentile as unlikely as 1 - confidence, the t-th slowest is an upper bound of it.
    Source: the inference rules of MLCommons, appendix on early stopping (binomial tail, tolerance 0).
    """
    ordered = np.sort(positive(samples_ms))
    runs = ordered.size
    allowed, below, tail = 0, -1, 0.0
    log_over, log_under = math.log1p(-share), math.log(share)
    while below < runs:
        below += 1
        log_choose = math.lgamma(runs + 1) - math.lgamma(below + 1) - math.lgamma(runs - below + 1)
        tail += math.exp(log_choose + below * log_over + (runs - below) * log_under)
        if tail > 1 - confidence:
            break
        allowed = below
    return float(ordered[runs - allowed]) if allowed else None


def percentile(samples_ms: Sequence[float], share: float) -> float:
    """The time that `share` of the runs stayed under, in ms; an estimate below `runs_needed(share)` runs."""
    return float(np.quantile(positive(samples_ms), share))


@dataclass(frozen=True)
class Speedup:
    """How many times faster the candidate is: the estimate, its 95 % interval, and the one that claims need."""

    value: float
    low: float
    high: float
    claim_low: float | None = None
    claim_high: float | None = None

    def verdict(self, margin: float = MARGIN) -> Verdict:
        """In words.

        "same": the whole interval lies within the margin. "faster", "slower": the 99 % interval excludes 1, the
        estimate lies outside the margin, and the interval is not absurdly wide. Anything else is "undecided".
        """
        below, above = 1 / (1 + margin), 1 + margin
        low = self.low if self.claim_low is None else self.claim_low
        high = self.high if self.claim_high is None else self.claim_high
        if below <= self.low and self.high <= above:
            return "same"
        if high > WIDEST * low:
            return "undecided"
        if low > 1 and self.value > above:
            return "faster"
        if high < 1 and self.value < below:
            return "slower"
        return "undecided"


def log_ratio(candidate_ms: Sequence[float], reference_ms: Sequence[float]) -> float:
    """ln(reference / candidate) of one block, from the medians of its slots; in ABBA order linear drift cancels."""
    return float(np.mean(np.log(positive(reference_ms))) - np.mean(np.log(positive(candidate_ms))))


def speedup(log_ratios: Sequence[float], *, seed: int, confidence: float = 0.95) -> Speedup | None:
    """The speed-up that paired blocks show; None when there are fewer than MIN_BLOCKS.

    The 20 % trimmed mean of the log ratios (the mean below 8 blocks), so that single blocks cannot decide, with a
    symmetric studentized bootstrap over blocks. Studentizing keeps the coverage at few blocks, where a percentile
    interval is too narrow.
    Source: R. Wilcox, Introduction to Robust Estimation and Hypothesis Testing, chapter 4 (trimmed mean, bootstrap-t).
    """
    values = np.asarray(log_ratios, dtype=np.float64)
    if not np.all(np.isfinite(values)):
        raise InputRefused("DT313", "the ratios of block medians must be finite")
    if values.size < MIN_BLOCKS:
        return None
    rng = np.random.default_rng(seed)
    means, errors = _trimmed(values[None, :])
    center, error = float(means[0]), float(errors[0])
    drawn_means, drawn_errors = _trimmed(values[rng.integers(0, values.size, (_RESAMPLES, values.size))])
    usable = drawn_errors > 0
    if error == 0 or not usable.any():
        return Speedup(math.exp(center), math.exp(float(values.min())), math.exp(float(values.max())))
    distances = np.abs(drawn_means[usable] - center) / drawn_errors[usable]
    quantiles = np.quantile(distances, [confidence, max(confidence, CLAIM_CONFIDENCE)])
    half, wide = (min(float(q) * error, _NOTHING_TOLD) for q in quantiles)
    return Speedup(math.exp(center), math.exp(center - half), math.exp(center + half),
                   math.exp(center - wide), math.exp(center + wide))  # fmt: skip


def center(log_ratios: Sequence[float]) -> float:
    """The estimate of `speedup` as a logarithm, of any number of log ratios."""
    return float(_trimmed(np.asarray(log_ratios, dtype=np.float64)[None, :])[0][0])


def spread(log_ratios: Sequence[float]) -> Speedup:
    """The median ratio with the lowest and highest seen: what can be told of blocks that decide nothing."""
    values = np.asarray(log_ratios, dtype=np.float64)
    return Speedup(math.exp(float(np.median(values))), math.exp(float(values.min())), math.exp(float(values.max())))


def _trimmed(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Trimmed mean and its standard error (from the winsorized variance) of each row of [rows, blocks]."""
    ordered = np.sort(rows, axis=1)
    count = ordered.shape[1]
    cut = int(_TRIM * count) if count >= _TRIM_FROM else 0
    mean = ordered[:, cut : count - cut].mean(axis=1)
    if cut:
        ordered[:, :cut] = ordered[:, cut : cut + 1]
        ordered[:, count - cut :] = ordered[:, count - cut - 1 : count - cut]
    error = ordered.std(axis=1, ddof=min(1, count - 1)) / ((1 - 2 * cut / count) * math.sqrt(count))
    return mean, error

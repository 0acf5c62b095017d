"""The statistics of speed, on data whose answer is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deploytool.bench.statistics import (
    MIN_BLOCKS,
    Speedup,
    log_ratio,
    percentile,
    runs_needed,
    speedup,
    spread,
    sure_percentile,
)
from deploytool.errors import InputRefused


@pytest.mark.parametrize(("share", "runs"), [(0.9, 64), (0.95, 130), (0.97, 219), (0.99, 662), (0.999, 6636)])
def test_runs_needed_as_mlperf(share: float, runs: int) -> None:
    """The fewest runs for a percentile are those that the MLPerf Inference rules lead to."""
    assert runs_needed(share) == runs


def test_percentile() -> None:
    """A percentile is the quantile of the runs seen."""
    times = np.arange(1.0, 663.0)
    assert percentile(times.tolist(), 0.99) == pytest.approx(np.quantile(times, 0.99))


def test_sure_percentile() -> None:
    """The bound is told from as many runs as MLPerf asks for, and is rarely below the true percentile."""
    assert sure_percentile([1.0] * 661, 0.99) is None and sure_percentile(np.arange(1.0, 663.0).tolist(), 0.99) == 662
    rng = np.random.default_rng(0)
    below = sum((sure_percentile(rng.uniform(0.001, 1, 2000).tolist(), 0.9) or 0) < 0.9 for _ in range(400))
    assert below <= 10


def test_claims_need_more_than_the_interval() -> None:
    """A difference is claimed only when the wider interval excludes 1 too."""
    assert Speedup(1.05, 1.01, 1.09).verdict() == "faster"
    assert Speedup(1.05, 1.01, 1.09, 0.99, 1.11).verdict() == "undecided"
    found = speedup([0.01, 0.02, 0.015, 0.03, 0.01, 0.02, 0.012, 0.018], seed=0)
    assert found is not None and found.claim_low is not None and found.claim_high is not None
    assert found.claim_low < found.low < found.value < found.high < found.claim_high


def test_spread_is_what_was_seen() -> None:
    """Blocks too few to decide are told by their median, lowest and highest ratio."""
    seen = spread([math.log(2.0), math.log(8.0), math.log(3.0)])
    assert (seen.value, seen.low, seen.high) == pytest.approx((3.0, 2.0, 8.0))


@pytest.mark.parametrize("values", [[], [0.0], [1.0, -2.0], [1.0, math.nan], [math.inf]])
def test_refuses_impossible_times(values: list[float]) -> None:
    """Empty, zero, negative, NaN and infinite times are refused, never averaged."""
    with pytest.raises(InputRefused, match="times must be"):
        percentile(values, 0.9)
    with pytest.raises(InputRefused, match="times must be"):
        log_ratio([1.0], values)


def test_refuses_ratios_that_are_no_numbers() -> None:
    """A NaN among the ratios is refused."""
    with pytest.raises(InputRefused):
        speedup([0.0] * 9 + [math.nan], seed=0)


def test_ratio_says_which_is_faster() -> None:
    """A reference that takes twice as long gives a speed-up of 2, whatever the drift within the block."""
    assert math.exp(log_ratio([10.0, 10.0], [20.0, 20.0])) == pytest.approx(2)
    drift = [1.0, 1.1, 1.2, 1.3]
    a, b = [10 * drift[0], 10 * drift[3]], [20 * drift[1], 20 * drift[2]]
    assert math.exp(log_ratio(a, b)) == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("blocks", [6, 10, 20, 40])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_interval_covers_no_difference(blocks: int, tails: str) -> None:
    """Without a difference the 95 % interval holds 1 in at least 93 of 100 trials, with normal and heavy tails."""
    rng = np.random.default_rng(blocks)
    covered = 0
    for trial in range(200):
        noise = rng.standard_normal(blocks) if tails == "normal" else rng.standard_t(3, blocks)
        found = speedup((0.015 * noise).tolist(), seed=trial)
        assert found is not None
        covered += found.low <= 1 <= found.high
    assert covered >= 186


def test_the_widest_interval_is_finite() -> None:
    """Nearly equal blocks beside a wild one give an interval that tells nothing, in finite numbers, and no error."""
    found = speedup([0.0, 1e-9, 2e-9, 3e-9, 1.0], seed=0)
    assert found and found.low < 1e-6 and 1e6 < found.high < 1e12 and found.verdict() == "undecided"


def test_finds_five_percent() -> None:
    """A difference of 5 % under 1.5 % noise is found, on either side, in nearly every trial of 20 blocks."""
    rng = np.random.default_rng(1)
    right = 0
    for trial in range(100):
        noise = 0.015 * rng.standard_normal(20)
        faster = speedup((noise + math.log(1.05)).tolist(), seed=trial)
        slower = speedup((noise - math.log(1.05)).tolist(), seed=trial)
        assert faster is not None and slower is not None
        right += faster.verdict() == "faster" and slower.verdict() == "slower"
    assert right >= 95


def test_never_claims_a_difference_that_is_not_there() -> None:
    """Equal programs under 1.5 % noise are called the same, and never faster or slower."""
    rng = np.random.default_rng(2)
    verdicts = []
    for trial in range(100):
        found = speedup((0.015 * rng.standard_normal(20)).tolist(), seed=trial)
        assert found is not None
        verdicts.append(found.verdict())
    assert set(verdicts) <= {"same", "undecided"}
    assert verdicts.count("same") >= 95


def test_one_wild_block_decides_nothing() -> None:
    """One block in twelve that is off by a factor of three does not turn equal programs into a difference."""
    ratios = [0.001, -0.002, 0.0015, -0.001, 0.002, -0.0015, 0.0005, -0.0005, 0.001, -0.001, 0.0, math.log(3)]
    found = speedup(ratios, seed=0)
    assert found is not None
    assert found.verdict() == "same"


def test_few_blocks_give_no_interval() -> None:
    """Below the least number of blocks there is no speed-up at all."""
    assert speedup([0.1] * (MIN_BLOCKS - 1), seed=0) is None
    assert speedup([0.1] * MIN_BLOCKS, seed=0) is not None


def test_same_seed_same_interval() -> None:
    """The same blocks and seed give the same numbers, bit for bit."""
    ratios = np.random.default_rng(3).standard_normal(12).tolist()
    assert speedup(ratios, seed=7) == speedup(ratios, seed=7)
    assert speedup(ratios, seed=7) != speedup(ratios, seed=8)


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.0, 0.985, 1.015, "same"),
        (1.01, 1.005, 1.02, "same"),
        (1.0, 0.95, 1.05, "undecided"),
        (1.10, 0.99, 1.20, "undecided"),
        (1.02, 1.001, 1.04, "undecided"),
        (1.05, 1.01, 1.09, "faster"),
        (0.95, 0.91, 0.99, "slower"),
        (0.9, 0.5, 1.5, "undecided"),
        (30.0, 12.0, 70.0, "undecided"),
        (0.03, 0.01, 0.09, "undecided"),
        (30.0, 25.0, 36.0, "faster"),
    ],
)
def test_verdict(value: float, low: float, high: float, verdict: str) -> None:
    """The verdict follows from the interval, the estimate and the margin of 2 %."""
    assert Speedup(value, low, high).verdict() == verdict

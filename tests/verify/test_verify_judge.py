"""Task metrics and decoded tokens against a profile's limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from deploytool.difference import Difference
from deploytool.errors import InputRefused
from deploytool.target import Limits
from deploytool.verify.judge import compare_quality, judge_parity, judge_quality, paired

LIMITS = Limits(cosine_min=0, metric_drop_max=0.01, generation_min=0.9)


def quality(reference: float, candidate: float | None, lower: bool = False) -> dict[str, Any]:
    return {"m": {"reference": reference, "candidate": candidate, "lower_is_better": lower}}


@pytest.mark.parametrize(
    ("reference", "candidate", "lower", "passes"),
    [
        (0.90, 0.895, False, True), (0.90, 0.88, False, False), (0.90, 0.99, False, True),
        (14.0, 14.1, True, True), (14.0, 14.3, True, False), (14.0, 10.0, True, True), (14.0, 5e6, True, False),
        (-2.0, -2.1, False, False), (-2.0, -1.9, False, True), (-2.0, -2.1, True, True), (-2.0, -1.9, True, False),
        (0.0, 0.0, False, True), (0.0, -1e-6, False, False), (0.0, 1e-6, True, False),
        (0.90, None, False, False), (0.90, None, True, False),
    ],
)  # fmt: skip
def test_metrics_are_judged_in_their_direction(
    reference: float, candidate: float | None, lower: bool, passes: bool
) -> None:
    """A loss beyond the limit must fail and a gain pass, in the metric's direction; a missing metric must fail."""
    assert (judge_quality(quality(reference, candidate, lower), None, LIMITS) == []) == passes


def test_a_metric_that_is_no_number_fails() -> None:
    """NaN must not pass for being smaller than nothing."""
    assert judge_quality(quality(0.9, float("nan")), None, LIMITS)
    assert judge_quality(quality(float("nan"), 0.9), None, LIMITS)


def test_what_two_evaluations_make_of_each_other() -> None:
    """Metrics are paired by name; those that the candidate lacks stay, as None."""
    reference = {"metrics": {"accuracy": 0.9, "loss": 1.0}, "tokens": []}
    paired, generation = compare_quality(reference, {"metrics": {"loss": 1.1, "new": 3.0}, "tokens": []}, ("loss",))
    assert generation is None and list(paired) == ["accuracy", "loss"]
    assert paired["accuracy"] == {"reference": 0.9, "candidate": None, "lower_is_better": False}
    assert paired["loss"] == {"reference": 1.0, "candidate": 1.1, "lower_is_better": True}
    assert len(judge_quality(paired, None, LIMITS)) == 2


def test_generation_agreement() -> None:
    """The share of equal tokens over all prompts must be counted, and held to the profile's limit where it has one."""
    reference: dict[str, Any] = {"metrics": {}, "tokens": [[1, 2, 3, 4], [5, 6, 7, 8, 9, 10]],
                                 "rivals": [[None] * 4, [None] * 6]}  # fmt: skip
    candidate = {"metrics": {}, "tokens": [[1, 2, 3, 4], [5, 6, 0, 0, 9, 10]]}
    _, generation = compare_quality(reference, candidate, ())
    assert generation == {"prompts": 2, "tokens": 10, "ties": 0, "agreement": 0.8}
    assert "must be at least 0.9 (got 0.8000)" in judge_quality({}, generation, LIMITS)[0]
    assert judge_quality({}, generation, Limits(cosine_min=0, generation_min=0.8)) == []
    assert judge_quality({}, generation, Limits(cosine_min=0)) == []


@pytest.mark.parametrize(
    ("rivals", "got", "tokens", "ties", "agreement"),
    [
        ([None, None, 7, None], [1, 2, 7, 9], 2, 1, 1.0),  # parted at the near tie: what follows is another sentence
        ([None, None, 8, None], [1, 2, 7, 9], 4, 0, 0.5),  # a third token is no tie
        ([None, 7, None, 9], [1, 2, 7, 9], 4, 0, 0.5),  # nor are near ties after it parted, or elsewhere
        ([7, None, None, None], [7, 2, 3, 4], 0, 1, 0.0),  # nothing was compared
    ],
)
def test_near_ties(rivals: list[int | None], got: list[int], tokens: int, ties: int, agreement: float) -> None:
    """Where the reference itself could have gone on either way, a candidate that goes the other way is not wrong."""
    reference = {"metrics": {}, "tokens": [[1, 2, 3, 4]], "rivals": [rivals]}
    _, generation = compare_quality(reference, {"metrics": {}, "tokens": [got]}, ())
    assert generation == {"prompts": 1, "tokens": tokens, "ties": ties, "agreement": agreement}
    wrong = judge_quality({}, generation, LIMITS)
    assert bool(wrong) == (agreement < 0.9) and any("nearly tied" in said for said in wrong) == (tokens == 0)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.2, True), (2.0, False), (0.3, False), (-1.0, False)])
def test_one_row_of_the_wrong_scale(factor: float, passes: bool) -> None:
    """A single row of a large batch must fail for its scale alone, under an int8 target's limits too."""
    reference = np.random.default_rng(0).standard_normal((200, 16), dtype=np.float32)
    candidate = reference.copy()
    candidate[7] *= factor
    difference = Difference("y", batched=True)
    difference.add(0, reference, candidate)
    parity = {"cases": 1, "outputs": {"y": difference.summary()}}
    assert (judge_parity(parity, Limits(cosine_min=0.98, sqnr_db_min=12)) == []) == passes


def test_differences_are_paired() -> None:
    """Samples that are equally hard for both cancel: a small loss on every one of them is told from chance."""
    hard = np.random.default_rng(0).normal(0.0, 5.0, 200)
    noise = np.random.default_rng(1).normal(0.0, 0.1, 200)
    found = paired("m", hard.tolist(), (hard - 0.1 + noise).tolist())
    assert found["samples"] == 200 and found["ci"][0] < found["difference"] < found["ci"][1] < 0
    assert found == paired("m", hard.tolist(), (hard - 0.1 + noise).tolist())
    assert paired("m", [1.0, 0.0], [1.0, 0.0]) == {"samples": 2, "difference": 0.0, "ci": [0.0, 0.0]}
    told, _ = compare_quality({"metrics": {"m": 1.0}, "scores": {"m": [1.0, 1.0]}, "tokens": []},
                              {"metrics": {"m": 0.5}, "scores": {"m": [1.0, 0.0]}, "tokens": []}, ())  # fmt: skip
    assert told["m"]["paired"]["difference"] == -0.5


def test_scores_that_do_not_pair_are_refused() -> None:
    """Fewer scores on one side, or none, give no interval of something else."""
    for reference, candidate in (([1.0, 0.0], [1.0]), ([1.0], []), ([], [])):
        with pytest.raises(InputRefused, match="of the same samples"):
            paired("m", reference, candidate)

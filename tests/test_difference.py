"""The figures behind parity: right on arrays whose answer is known, and never better than they should be."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest

from deploytool.difference import Difference, cosine

SEEDS = range(20)


def compared(*pairs: tuple[np.ndarray, np.ndarray], batched: bool = True) -> dict[str, Any]:
    difference = Difference("y", batched)
    for case, (reference, candidate) in enumerate(pairs):
        difference.add(case, reference, candidate)
    summary = difference.summary()
    json.dumps(summary, allow_nan=False)
    return summary


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    "array",
    [
        noise(0, 3, 5),
        np.zeros((2, 4), np.float32),
        np.array(1.5, np.float32),
        np.array([[0.0, -np.inf, 2.0]], np.float32),
        np.array([1, 2, 3], np.int64),
        np.array([True, False]),
        noise(1, 2, 3).astype(np.float16),
        noise(2, 2, 3).astype(np.float64) * 1e300,
        noise(3, 2, 3).astype(np.float64) * 1e-300,
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_equal_arrays_are_equal(array: np.ndarray) -> None:
    """An array compared with its copy must give no error and no problem, whatever it holds."""
    got = compared((array, array.copy()))
    assert (got["max_abs"], got["mean_abs"], got["sqnr_db"], got["cosine"], got["problems"]) == (0, 0, 300, 1, [])
    assert got["agreement"] in (None, 1.0) and got["elements"] == array.size


def test_empty_arrays_are_no_evidence() -> None:
    """A past of length 0 beside a real case is fine; empty arrays alone are nothing compared."""
    empty = np.zeros((1, 2, 0, 4), np.float32)
    assert compared((empty, empty), (noise(0, 1, 2), noise(0, 1, 2)))["problems"] == []
    assert compared((empty, empty))["problems"] == ["no element was compared"]
    assert "shape must be [1, 2, 0, 4]" in compared((empty, np.zeros((1, 2, 1, 4), np.float32)))["problems"][0]


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [
        (1.0, np.nan), (1.0, np.inf), (-np.inf, -3e38), (-np.inf, np.inf), (np.inf, np.nan), (np.nan, 1.0),
    ],
)  # fmt: skip
def test_what_is_not_finite_on_one_side_is_a_problem(reference: float, candidate: float) -> None:
    """NaN, and an infinity that the other side does not have, must be told and must not spoil the other figures."""
    a, b = noise(0, 2, 3), noise(0, 2, 3)
    a[1, 1], b[1, 1] = reference, candidate
    got = compared((a, b))
    assert len(got["problems"]) == 1 and "1 of 6 elements are not finite" in got["problems"][0]


@pytest.mark.parametrize("seed", SEEDS)
def test_figures_follow_their_definitions(seed: int) -> None:
    """Errors, SQNR and the worst row must be those computed directly from all cases at once."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(3):
        a = rng.standard_normal((int(rng.integers(1, 5)), 7)).astype(np.float32)
        pairs.append((a, (a + rng.standard_normal(a.shape) * 0.1).astype(np.float32)))
    a, b = (np.concatenate([p[i] for p in pairs]).astype(np.float64) for i in (0, 1))
    got = compared(*pairs)
    assert got["max_abs"] == np.abs(a - b).max()
    assert got["mean_abs"] == pytest.approx(np.abs(a - b).mean())
    assert got["sqnr_db"] == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    rows = [np.dot(x, y) / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    assert got["cosine"] == pytest.approx(min(rows))
    case = int(got["worst_sample"].split()[1])
    row = int(got["worst_sample"].split()[3])
    assert sum(len(p[0]) for p in pairs[:case]) + row == int(np.argmin(rows))
    assert got["agreement"] == np.mean(a.argmax(1) == b.argmax(1))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_noise_never_looks_better(seed: int) -> None:
    """Growing one error pattern must never raise cosine or SQNR, nor lower the largest error."""
    a, pattern = noise(seed, 4, 9), noise(seed + 1000, 4, 9)
    got = [compared((a, a + pattern * np.float32(size))) for size in (1e-4, 1e-2, 1.0, 100.0)]
    assert [g["max_abs"] for g in got] == sorted(g["max_abs"] for g in got)
    assert [g["sqnr_db"] for g in got] == sorted((g["sqnr_db"] for g in got), reverse=True)
    assert all(x["cosine"] > y["cosine"] for x, y in itertools.pairwise(got))


@pytest.mark.parametrize("seed", SEEDS)
def test_cosine_is_a_cosine(seed: int) -> None:
    """It must be symmetric, within -1 and 1, blind to positive scale at any size, and turn with the sign."""
    a, b = noise(seed, 33).astype(np.float64), noise(seed + 500, 33).astype(np.float64)
    assert cosine(a, b) == cosine(b, a) and -1 <= cosine(a, b) <= 1
    for scale in (1e-300, 1e-12, 3.0, 1e300):
        assert cosine(a, a * scale) == pytest.approx(1)
        assert cosine(a, -a * scale) == pytest.approx(-1)
    assert cosine(a, a * 0) == 0 and cosine(a * 0, a * 0) == 1


def test_whole_numbers_are_compared_as_decisions() -> None:
    """Class numbers that are near one another are still different classes."""
    got = compared((np.array([7, 8, 9, 900]), np.array([7, 9, 9, 901])))
    assert got["agreement"] == 0.5 and got["cosine"] > 0.999


def test_an_output_that_the_reference_lacks_is_a_problem() -> None:
    """An output without a counterpart must not count as compared."""
    difference = Difference("y", True)
    difference.add(0, None, noise(0, 2))
    assert difference.summary()["problems"] == ["case 0: the reference has no such output"]


@pytest.mark.parametrize("noise_size", [0.0, 1e-9, 1e-7])
def test_noise_beside_a_row_of_zeros_is_no_wrong_direction(noise_size: float) -> None:
    """A reference row of nothing has no direction: tiny noise there must not give a cosine of 0, nor a huge error."""
    a = noise(0, 3, 50)
    a[1] = 0
    b = a.copy()
    b[1] += noise(1, 50) * np.float32(noise_size)
    got = compared((a, b))
    assert got["cosine"] == 1.0 and got["relative_error"] < 1e-6


def test_a_row_of_zeros_that_became_something_is_told() -> None:
    """Noise as large as a tenth of the other rows where the reference has zeros must show, in the relative error."""
    a = noise(0, 3, 50)
    a[1] = 0
    b = a.copy()
    b[1] += noise(1, 50) / np.float32(10)
    got = compared((a, b))
    assert 0.05 < got["relative_error"] < 0.2 and got["worst_error_sample"] == "case 0 row 1"


def test_zeros_everywhere() -> None:
    """Against an output of zeros rounding is nothing, and numbers of any size are wrong."""
    zeros = np.zeros((2, 4), np.float32)
    assert (compared((zeros, zeros + np.float32(1e-8)))["cosine"], compared((zeros, zeros + 1))["cosine"]) == (1, 0)
    assert compared((zeros, zeros + np.float32(1e-8)))["sqnr_db"] == 300
    assert compared((zeros, zeros + np.float32(0.01)))["sqnr_db"] == -300


def test_choosing_an_equal_score_is_no_other_decision() -> None:
    """Where two scores tie within rounding, either choice agrees; a lower score chosen does not."""
    reference = np.array([[1.0, 1.0, 0.0], [0.0, 2.0, 2.0]], np.float32)
    tied = np.array([[1.0, 1.0 + 1e-6, 0.0], [0.0, 2.0, 2.0 + 1e-6]], np.float32)
    assert compared((reference, tied))["agreement"] == 1.0
    assert compared((reference, np.array([[0.9, 1.0, 1.1], [0.0, 2.0, 2.1]], np.float32)))["agreement"] == 0.5


@pytest.mark.parametrize("seed", SEEDS)
def test_divergence_of_logits_and_probabilities(seed: int) -> None:
    """KL must be that of the softmax of outputs called logits, the same of the probabilities themselves, and 0 of
    equals; other outputs have none."""
    a, b = (noise(s, 4, 6).astype(np.float64) for s in (seed, seed + 100))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (a, b))
    expected = (p * np.log(p / q)).sum(-1)

    def of(name: str, x: np.ndarray, y: np.ndarray) -> Any:
        difference = Difference(name, True)
        difference.add(0, x, y)
        return difference.summary()

    assert of("logits", a, b)["kl_mean"] == pytest.approx(expected.mean())
    assert of("logits", a, b)["kl_max"] == pytest.approx(expected.max())
    assert of("p", p, q)["kl_mean"] == pytest.approx(expected.mean())
    assert of("logits", a, a)["kl_max"] == pytest.approx(0, abs=1e-12) and of("y", a, b)["kl_mean"] is None

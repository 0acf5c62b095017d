"""Choosing the products that stay fp32."""

from __future__ import annotations

import numpy as np
import pytest

from deploytool.backends import sensitivity


def test_noise_is_what_int8_adds() -> None:
    """On values that lie on the int8 grids there must be no noise; elsewhere about half a step's worth."""
    x = np.arange(256, dtype=np.float32)[None]
    assert np.abs(sensitivity.int8_noise(x, np.ones((256, 3), np.float32), 7)).max() == 0
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 128)).astype(np.float32), rng.standard_normal((128, 32)).astype(np.float32)
    seven, eight = (np.linalg.norm(sensitivity.int8_noise(x, w, bits)) / np.linalg.norm(x @ w) for bits in (7, 8))
    assert 0.005 < eight < seven < 0.03


def test_an_outlier_makes_the_other_rows_lose() -> None:
    """One huge value shares its scale with every row: the mean error of rows must rise, which a total norm hides."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((64, 128)).astype(np.float32), rng.standard_normal((128, 32)).astype(np.float32)
    calm = sensitivity.own_error(x, w, 7)
    x[0, 0] = 500
    assert sensitivity.own_error(x, w, 7) > 10 * calm


@pytest.mark.parametrize(
    ("effects", "keep", "kept"),
    [
        ({"a": 0.1, "b": 0.001, "c": 0.002}, 1, ["a"]),
        ({"a": 0.1, "b": 0.001, "c": 0.002}, 0, []),
        ({"a": 0.1, "b": 0.001, "c": 0.002}, None, ["a", "c"]),
        ({"a": 0.1, "b": 0.03, "c": 0.02, "d": 0.004}, None, ["a", "b", "c"]),
        (dict.fromkeys("abcdefghij", 0.1), None, ["a", "b", "c", "d", "e"]),
    ],
    ids=["asked", "none", "at least two", "until within the budget", "at most a quarter"],
)
def test_who_is_kept(effects: dict[str, float], keep: int | None, kept: list[str]) -> None:
    """The largest effects on the outputs must be kept, as many as asked, else as the profile's cosine needs."""
    assert sensitivity.most_sensitive(effects, 20, keep, cosine_min=0.98) == kept


def test_a_broken_output_counts_as_lost() -> None:
    """NaN outputs must rank a product worst, not vanish from the ranking."""
    assert sensitivity.output_loss([np.ones(3)], [np.array([1, np.nan, 1])]) == 2.0
    assert sensitivity.output_loss([np.zeros(3)], [np.ones(3)]) == 1.0
    assert sensitivity.output_loss([np.ones(3)], [np.ones(3)]) == pytest.approx(0.0)


def test_feeds_are_spread() -> None:
    """A few feeds of many must come from the whole range, the first and the last among them."""
    feeds = [{"x": np.array(index)} for index in range(10)]
    assert [int(one["x"]) for one in sensitivity.spread(feeds, 4)] == [0, 3, 6, 9]
    assert len(sensitivity.spread(feeds, 20)) == 10
    assert len(sensitivity.spread(feeds, 1)) == 1

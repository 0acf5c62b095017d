"""The sizes that parity is taken at."""

from __future__ import annotations

import numpy as np
import pytest

from deploytool.errors import InputRefused
from deploytool.load.variants import further_rows, parity_feeds, shapes
from deploytool.signature import Outputs, Signature, TensorSpec


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def feed(**arrays: tuple[int, ...]) -> Outputs:
    rng = np.random.default_rng(0)
    return {name: rng.random(shape, dtype=np.float32) for name, shape in arrays.items()}


def sizes(signature: Signature, feeds: list[Outputs]) -> list[dict[str, int]]:
    return [signature.bind(f) for f in feeds]


def test_samples_of_three_sizes_are_enough() -> None:
    """Where the samples show a dimension at three sizes, nothing is made up."""
    signature = Signature((spec("x", "batch", 4),), ())
    samples = [feed(x=(n, 4)) for n in (1, 2, 5)]
    feeds = parity_feeds(signature, samples)
    assert [f["x"].shape for f in feeds] == [(1, 4), (2, 4), (5, 4)] and shapes(signature, feeds) == 3


def test_nothing_free_gives_the_samples() -> None:
    """A model of fixed sizes is compared at these."""
    signature = Signature((spec("x", 2, 4),), ())
    assert len(parity_feeds(signature, [feed(x=(2, 4))])) == 1


def test_samples_are_joined_along_the_batch() -> None:
    """One sample gives batches of two and three, of its own rows."""
    signature = Signature((spec("x", "batch", 4), spec("y", 3)), ())
    sample = feed(x=(1, 4), y=(3,))
    feeds = parity_feeds(signature, [sample])
    assert [f["x"].shape[0] for f in feeds] == [1, 2, 3]
    assert all(np.array_equal(row, sample["x"][0]) for f in feeds for row in f["x"])
    assert all(np.array_equal(f["y"], sample["y"]) for f in feeds)


def test_only_alike_samples_are_joined() -> None:
    """Rows of another length cannot stand in one batch."""
    signature = Signature((spec("x", "batch", "time"),), ())
    samples = [feed(x=(1, n)) for n in (3, 8, 5)]
    assert [f["x"].shape for f in parity_feeds(signature, samples)] == [(1, 3), (1, 8), (1, 5), (2, 3), (3, 3)]


def test_other_dimensions_are_cut() -> None:
    """A length seen at one size is cut to a half and a quarter of real data, in every input that has it."""
    signature = Signature((spec("x", 1, "time"), spec("y", "time", 2)), ())
    sample = feed(x=(1, 8), y=(8, 2))
    feeds = parity_feeds(signature, [sample])
    assert sizes(signature, feeds) == [{"time": 8}, {"time": 2}, {"time": 4}]
    assert np.array_equal(feeds[1]["x"], sample["x"][:, :2]) and np.array_equal(feeds[2]["y"], sample["y"][:4])


@pytest.mark.parametrize("length", [0, 1, 2, 3])
def test_too_few_shapes_are_refused(length: int) -> None:
    """A free dimension that cannot be shown at three sizes is refused: parity at one shape says nothing of others."""
    signature = Signature((spec("x", 1, "time"),), ())
    with pytest.raises(InputRefused, match="3 different shapes, since 'time' may differ"):
        parity_feeds(signature, [feed(x=(1, length))])


def test_short_dimensions_are_not_cut_to_nothing() -> None:
    """No feed of length 0 is made where the samples have none."""
    signature = Signature((spec("x", 1, "time"),), ())
    feeds = parity_feeds(signature, [feed(x=(1, n)) for n in (1, 2, 3)])
    assert all(f["x"].shape[1] > 0 for f in feeds)


def test_rows_of_any_name_are_joined() -> None:
    """A free dimension that is always first is joined from real samples, whatever it is called."""
    signature = Signature((spec("x", "rows", 4),), ())
    assert [f["x"].shape[0] for f in parity_feeds(signature, [feed(x=(1, 4))])] == [1, 2, 3]


def test_the_samples_are_left_alone() -> None:
    """Deriving feeds must not change what was given."""
    signature = Signature((spec("x", "batch", "time"),), ())
    sample = feed(x=(2, 4))
    kept = {name: array.copy() for name, array in sample.items()}
    for derived in parity_feeds(signature, [sample])[1:]:
        derived["x"][:] = 0
    assert np.array_equal(sample["x"], kept["x"])


@pytest.mark.parametrize(
    ("batches", "made"),
    [((4, 8, 16), [1, 2, 3]), ((4, 5, 8), [1, 2]), ((1, 2, 4), [3]), ((1, 2, 7), []), ((2, 6, 8), [1, 3])],
)
def test_few_rows_are_made_where_no_sample_has_them(batches: tuple[int, ...], made: list[int]) -> None:
    """One, two and an odd number of rows must be seen, of real rows; what is there is not made again."""
    signature = Signature((spec("x", "batch", "time"), spec("y", "batch"), spec("z", 2)), ())
    feeds = [feed(x=(batch, 3 + batch), y=(batch,), z=(2,)) for batch in batches]
    rows = further_rows(signature, feeds)
    assert [f["x"].shape for f in rows] == [(count, 3 + batches[0]) for count in made]
    for f in rows:
        assert all(np.array_equal(row, feeds[0]["x"][i % batches[0]]) for i, row in enumerate(f["x"]))
        assert f["y"].shape == f["x"].shape[:1] and np.array_equal(f["z"], feeds[0]["z"])


def test_no_rows_are_made_of_other_dimensions() -> None:
    """A length, or a dimension that is not always first, is left alone; so is a model of fixed sizes."""
    for shape in ((8, "time"), ("side", "side"), (8, 8)):
        assert further_rows(Signature((spec("x", *shape),), ()), [feed(x=(8, 8))]) == []
    for empty in ((4, 0), (0, 4)):
        assert further_rows(Signature((spec("x", "batch", "time"),), ()), [feed(x=empty)]) == []

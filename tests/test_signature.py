"""What a signature says of feeds that do not fit."""

from __future__ import annotations

import numpy as np
import pytest

from deploytool.errors import InputRefused
from deploytool.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("ids", "int64", (2, "time")), TensorSpec("mask", "int64", (2, "time"))), ())


def feeds(ids: tuple[int, ...], mask: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {"ids": np.zeros(ids, np.int64), "mask": np.zeros(mask, np.int64)}


def test_a_signature_reads_as_a_line() -> None:
    """Messages must name inputs and outputs with type and shape, not Python's classes."""
    assert str(SIGNATURE) == "ids: int64[2, time], mask: int64[2, time] -> nothing"


def test_free_sizes_are_bound() -> None:
    """Feeds that fit must give the sizes of the free dimensions alone."""
    assert SIGNATURE.bind(feeds((2, 5), (2, 5))) == {"time": 5}


def test_another_size_of_a_fixed_axis_is_explained() -> None:
    """A fixed batch of another size must be told by input, axis, size wanted and got, and what to do."""
    with pytest.raises(InputRefused) as caught:
        SIGNATURE.bind(feeds((3, 5), (3, 5)))
    error = caught.value
    assert (error.code, error.message) == ("DT308", "axis 0 of input 'ids' must have the fixed size 2 (got 3)")
    assert list(error.detail) == ["the input: ids: int64[2, time]", "got: [3, 5]"]
    assert error.fix.startswith("give size 2 there, or export again with that axis free")


def test_inputs_that_do_not_belong_together_are_explained() -> None:
    """Two sizes of one free dimension must be told by both places, not as a fault of one size alone."""
    with pytest.raises(InputRefused) as caught:
        SIGNATURE.bind(feeds((2, 5), (2, 4)))
    assert caught.value.message == (
        "axis 1 of input 'mask' must have size 5, as axis 1 of input 'ids' has: both are 'time' (got 4)"
    )
    assert caught.value.fix == "give all inputs the same size of 'time'"

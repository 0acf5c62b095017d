"""What sizes and padding the cases showed must be told, and what they did not show too."""

from __future__ import annotations

import numpy as np
import pytest

from deploytool.cases import Case
from deploytool.signature import Signature, TensorSpec
from deploytool.verify.sizes import Seen, unseen

SHAPE = ("batch", "time")
SIGNATURE = Signature((TensorSpec("x", "float32", SHAPE), TensorSpec("mask", "int64", SHAPE)), ())


def seen(*shapes: tuple[int, int], padded: bool = True) -> Seen:
    found = Seen(SIGNATURE)
    for shape in shapes:
        mask = np.ones(shape, np.int64)
        mask[-1, -1] = 0 if padded else 1
        found.add(Case({"x": np.zeros(shape, np.float32), "mask": mask}))
    return found


def test_sizes_and_padding_are_counted() -> None:
    """Every size of every free dimension must be listed once, in order, and the padded cases counted."""
    assert seen((3, 4), (1, 4), (2, 9)).summary() == {"sizes": {"batch": [1, 2, 3], "time": [4, 9]}, "padded": 3}
    assert seen((3, 4), padded=False).summary()["padded"] == 0


@pytest.mark.parametrize(
    ("shapes", "padded", "said"),
    [
        (((1, 1), (2, 2), (3, 3)), True, []),
        (((1, 1), (2, 2), (3, 3)), False, ["no case has padding: that the mask is heeded is not shown"]),
        (((1, 1), (2, 2), (3, 8)), True, ["time was compared at 1, 2, 8: not at a larger odd one"]),
        (((4, 1), (5, 2), (5, 3)), True, ["batch was compared at 4, 5: not at 1, 2"]),
    ],
)
def test_what_was_not_shown_is_told(shapes: tuple[tuple[int, int], ...], padded: bool, said: list[str]) -> None:
    """Sizes of 1, 2 and an odd one, and padding where there is a mask, must be missed by name."""
    assert unseen(seen(*shapes, padded=padded).summary(), SIGNATURE.input_names) == said

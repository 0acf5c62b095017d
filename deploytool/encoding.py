"""An encoding: the grid of values that a quantized tensor may take. Chosen once, it travels with the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_BITS, MOST_BITS = 2, 8


@dataclass(frozen=True)
class Encoding:
    """value = (code - zero_point) * scale, with codes 0 to 2^bits - 1.

    The tensor is looked at as a matrix: `axis` is its rows, everything else its columns. Each row is cut into groups of
    `group` columns; the last group of a row may be shorter. `load.grid` has what computes with it.

    bits        2 to 8
    axis        the axis whose entries have scales of their own; None: one scale for the whole tensor
    group       columns that share a scale and a zero point
    scale       float32 [rows, groups], above zero; [1, 1] without an axis
    zero_point  float32, as `scale`: the code that stands for 0. Whole numbers, but for grids that were found in weights
    """

    bits: int
    axis: int | None
    group: int
    scale: Tensor
    zero_point: Tensor

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return 1 << self.bits

    @property
    def symmetric(self) -> bool:
        """Whether 0 stands in the middle of the codes everywhere, so that signed codes need no zero point."""
        return bool((self.zero_point == self.levels // 2).all())

    @property
    def whole_zero_points(self) -> bool:
        """Whether every zero point is itself a code; engines that store them as integers need it."""
        whole = (self.zero_point == self.zero_point.round()) & (self.zero_point >= 0)
        return bool((whole & (self.zero_point < self.levels)).all())

    def to_json(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {"bits": self.bits, "axis": self.axis, "group": self.group}

"""An encoding: the grid of values that a quantized tensor may take. Chosen once, it travels with the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

FEWEST_BITS, MOST_BITS = 2, 8
ENCODINGS = "encodings.npz"  # in a prepared folder


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


@dataclass(frozen=True)
class Coded:
    """A quantized matrix in NumPy, as engines want it: codes uint8 [rows, columns], rows are output channels.

    scale and zero_point float32 [rows, groups], as in `Encoding`.
    """

    bits: int
    group: int
    codes: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray

    def values(self) -> np.ndarray:
        """float32 [rows, columns]."""
        scale, zero = (self._spread(part) for part in (self.scale, self.zero_point))
        return np.asarray((self.codes.astype(np.float32) - zero) * scale)

    def in_blocks(self, sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """codes [rows, blocks, size], scale and zero_point [rows, blocks], with the largest of `sizes` that fits.

        A group may be several blocks of one scale. The last block is filled up with codes of 0.0. None when no size
        divides the group; a group that is a whole row needs none.
        """
        columns = self.codes.shape[1]
        whole = self.group >= columns
        fitting = [size for size in sizes if whole or self.group % size == 0]
        if not fitting:
            return None
        size = min((s for s in fitting if s >= columns), default=max(fitting)) if whole else max(fitting)
        blocks = -(-columns // size)
        group_of = np.zeros(blocks, int) if whole else np.arange(blocks) * size // self.group
        scale, zero = self.scale[:, group_of], self.zero_point[:, group_of]
        filled = np.repeat(zero, size, axis=1).astype(np.uint8)
        filled[:, :columns] = self.codes
        return filled.reshape(len(filled), blocks, size), scale, zero

    def _spread(self, part: np.ndarray) -> np.ndarray:
        return np.repeat(part, self.group, axis=1)[:, : self.codes.shape[1]]


def save_coded(path: Path, matrices: Mapping[str, Coded]) -> None:
    """Write matrices by name to an .npz file."""
    arrays: dict[str, np.ndarray] = {}
    for index, (name, matrix) in enumerate(matrices.items()):
        arrays |= {f"{index}.name": np.array(name), f"{index}.bits": np.array(matrix.bits),
                   f"{index}.group": np.array(matrix.group), f"{index}.codes": matrix.codes,
                   f"{index}.scale": matrix.scale, f"{index}.zero_point": matrix.zero_point}  # fmt: skip
    np.savez(path, **arrays)  # type: ignore[arg-type]


def read_coded(path: Path) -> dict[str, Coded]:
    """The matrices that `save_coded` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {
            str(file[f"{i}.name"]): Coded(int(file[f"{i}.bits"]), int(file[f"{i}.group"]), file[f"{i}.codes"],
                                          file[f"{i}.scale"], file[f"{i}.zero_point"])
            for i in range(len(file.files) // 6)
        }  # fmt: skip

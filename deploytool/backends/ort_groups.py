"""Weights in 4 or 8 bits with one scale and zero point per group of a row, and their packing for ONNX Runtime.

A value is (code - zero) * scale with codes 0 .. 2^bits - 1, a row is cut into groups along the inputs. Packing as the
operators MatMulNBits and GatherBlockQuantized read it: two 4-bit codes in a byte, the first in the low half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deploytool.encoding import Coded

_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a group's range: outliers cut off buy finer steps for the rest
_BLOCKS = (16, 32, 64, 128, 256)
_ROWS = 4096  # rows handled at once: bounds the memory


@dataclass(frozen=True)
class Grouped:
    """A matrix [rows, columns]: codes uint8 [rows, groups, group], scales float32 and zeros uint8 [rows, groups]."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    @property
    def group(self) -> int:
        return int(self.codes.shape[2])

    @property
    def nbytes(self) -> int:
        """Bytes that a product reads: codes, scales and zero points."""
        return self.codes.size * self.bits // 8 + self.scales.nbytes + self.packed_zeros().nbytes

    def packed(self) -> np.ndarray:
        """uint8 [rows, groups, group * bits / 8]."""
        return self.codes if self.bits == 8 else _pairs(self.codes)

    def packed_zeros(self) -> np.ndarray:
        """uint8 [rows, groups], or for 4 bits [rows, half of the groups, rounded up]."""
        if self.bits == 8:
            return self.zeros
        return _pairs(np.pad(self.zeros, ((0, 0), (0, self.zeros.shape[1] % 2))))

    def values(self, columns: int) -> np.ndarray:
        """float32 [rows, columns]: what the operators compute with."""
        numbers: np.ndarray = (self.codes.astype(np.float32) - self.zeros[..., None]) * self.scales[..., None]
        return np.asarray(numbers.reshape(len(numbers), -1)[:, :columns])


def grouped(weight: np.ndarray, bits: int, group: int, importance: np.ndarray | None = None) -> Grouped:
    """Round a matrix float32 [rows, columns] to nearest; rows are filled up with zeros to whole groups.

    importance   float [columns], the mean square of each input: errors of weights that meet large inputs count more
                 when the range of a group is chosen. 8-bit groups keep their whole range.
    """
    parts = [_rounded(weight[at : at + _ROWS], bits, group, importance) for at in range(0, len(weight), _ROWS)]
    codes, scales, zeros = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Grouped(bits, codes, scales, zeros)


def grouped_from(parts: Sequence[Coded | None]) -> tuple[Grouped | None, str]:
    """Matrices that were quantized before, one below the other; None, and why, where the operators cannot take them."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None, "only some of the products that are computed as one are quantized"
    if len({(part.bits, part.group) for part in known}) > 1:
        return None, "products that are computed as one have different bits or groups"
    if known[0].bits not in (4, 8):
        return None, f"the operators take 4 and 8 bits (got {known[0].bits})"
    blocks = [part.in_blocks(_BLOCKS) for part in known]
    if any(block is None for block in blocks):
        return None, f"the operators take groups of {', '.join(map(str, _BLOCKS))} (got {known[0].group})"
    codes, scales, zeros = (np.concatenate(arrays) for arrays in zip(*(b for b in blocks if b), strict=True))
    whole = np.round(zeros)
    if (whole != zeros).any() or whole.min() < 0 or whole.max() >= 2 ** known[0].bits:
        return None, "zero points must be whole numbers for the fast kernels"
    return Grouped(known[0].bits, codes, scales.astype(np.float32), whole.astype(np.uint8)), ""


def _rounded(
    weight: np.ndarray, bits: int, group: int, importance: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    cut = in_groups(weight, group)
    counts = np.ones(cut.shape[1:], np.float32) if importance is None else in_groups(
        np.maximum(importance, 1e-8 * importance.max())[None].astype(np.float32), group)[0]  # fmt: skip
    low, high = np.minimum(cut.min(2), 0), np.maximum(cut.max(2), 0)
    best = None
    for shrink in _SHRINKS if bits < 8 else _SHRINKS[:1]:
        scale = ((high - low) * np.float32(shrink / (2**bits - 1))).astype(np.float32)
        scale[scale == 0] = 1.0
        zero = np.clip(np.round(-low * np.float32(shrink) / scale), 0, 2**bits - 1)
        codes = np.clip(np.round(cut / scale[..., None]) + zero[..., None], 0, 2**bits - 1)
        off = (codes - zero[..., None]) * scale[..., None] - cut
        error = np.einsum("rgk,gk->rg", off * off, counts)
        if best is None:
            best = [error, codes, scale, zero]
            continue
        better = error < best[0]
        for kept, new in zip(best, (error, codes, scale, zero), strict=True):
            kept[better] = new[better]
    assert best is not None  # there is at least one range
    return best[1].astype(np.uint8), best[2], best[3].astype(np.uint8)


def in_groups(weight: np.ndarray, group: int) -> np.ndarray:
    """[rows, columns] as [rows, groups, group], filled up with zeros."""
    short = -weight.shape[1] % group
    return np.pad(weight, ((0, 0), (0, short))).reshape(len(weight), -1, group)


def _pairs(codes: np.ndarray) -> np.ndarray:
    packed: np.ndarray = codes[..., ::2] | (codes[..., 1::2] << 4)
    return packed

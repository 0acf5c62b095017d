"""Grids: codes and values, packing, and what a damaged encoding is told."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from deploytool.encoding import Encoding
from deploytool.errors import InputRefused
from deploytool.load.grid import check_encoding, dequantize, fits, lies_on, pack, quantize, snap, unpack


def _encoding(bits: int, axis: int | None, group: int, rows: int, columns: int) -> Encoding:
    generator = torch.Generator().manual_seed(bits * group)
    groups = -(-columns // group)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
    return Encoding(bits, axis, group, scale, zero)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(5, 7), (3,), (1,), (2, 3, 5), (16, 64)])
def test_packed_codes_come_back(bits: int, shape: tuple[int, ...]) -> None:
    """Packing must take ceil(n bits / 8) bytes, leave no gap, and be undone exactly."""
    codes = torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    packed = pack(codes, bits)
    assert packed.shape == (-(-codes.numel() * bits // 8),)
    bitwise = "".join(f"{code:0{bits}b}"[::-1] for code in codes.flatten().tolist())
    assert bitwise == "".join(f"{byte:08b}"[::-1] for byte in packed.tolist())[: len(bitwise)]
    assert torch.equal(unpack(packed, bits, codes.shape), codes)
    with pytest.raises(InputRefused, match="bytes"):
        unpack(torch.cat([packed, packed]), bits, codes.shape)


@pytest.mark.parametrize(("axis", "rows"), [(0, 6), (1, 10), (2, 3), (None, 1)])
def test_values_are_the_formula(axis: int | None, rows: int) -> None:
    """(code - zero point) * scale must hold for every element, each with the scale of its row and group."""
    weight = torch.randn(6, 10, 3, generator=torch.Generator().manual_seed(0))
    columns = weight.numel() // rows
    encoding = _encoding(4, axis, 4, rows, columns)
    codes = quantize(weight, encoding)
    moved = np.moveaxis(codes.numpy(), axis, 0) if axis is not None else codes.numpy()
    table = moved.reshape(rows, columns).astype(np.float32)
    group = np.arange(columns) // 4
    expected = (table - encoding.zero_point.numpy()[:, group]) * encoding.scale.numpy()[:, group]
    expected = np.moveaxis(expected.reshape(moved.shape), 0, axis) if axis is not None else expected.reshape(6, 10, 3)
    np.testing.assert_array_equal(dequantize(codes, encoding).numpy(), expected)
    snapped = snap(weight, encoding)
    assert lies_on(snapped, encoding) and not lies_on(weight, encoding)
    step = float(encoding.scale.max())
    inside = (codes > 0) & (codes < 15)
    assert (snapped - weight)[inside].abs().max() <= step / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_lie_on_their_grid_too(dtype: torch.dtype) -> None:
    """A half-precision weight must be found on the grid that it was put on."""
    encoding = _encoding(8, 0, 16, 8, 40)
    snapped = snap(torch.randn(8, 40).to(dtype), encoding)
    assert snapped.dtype == dtype and lies_on(snapped, encoding)


def test_what_an_encoding_says_of_itself() -> None:
    """Symmetric means the middle code everywhere; half a zero point is not whole; shapes must have a scale each."""
    encoding = _encoding(4, 0, 64, 3, 100)
    middle = dataclasses.replace(encoding, zero_point=torch.full((3, 2), 8.0))
    assert middle.symmetric and middle.whole_zero_points and middle.levels == 16
    assert not dataclasses.replace(middle, zero_point=torch.full((3, 2), 7.5)).whole_zero_points
    assert not dataclasses.replace(middle, zero_point=torch.full((3, 2), 16.0)).whole_zero_points
    assert fits(torch.Size((3, 100)), middle) and fits(torch.Size((3, 10, 10)), middle)
    assert not fits(torch.Size((3, 200)), middle) and not fits(torch.Size((4, 100)), middle)


@pytest.mark.parametrize("wrong", [
    {"bits": 1}, {"bits": 9}, {"group": 0}, {"scale": torch.zeros(3, 2)}, {"scale": torch.full((3, 2), torch.nan)},
    {"scale": torch.ones(3, 2, dtype=torch.float64)}, {"zero_point": torch.zeros(3, 1)},
    {"zero_point": torch.full((3, 2), torch.inf)}, {"scale": -torch.ones(3, 2)},
])  # fmt: skip
def test_damaged_encodings_are_refused(wrong: dict[str, object]) -> None:
    """Bits, groups, scales and zero points that cannot be must each be refused with the weight's name."""
    encoding = Encoding(4, 0, 64, torch.ones(3, 2), torch.zeros(3, 2))
    assert check_encoding("w", encoding) is encoding
    with pytest.raises(InputRefused, match="encoding of 'w'"):
        check_encoding("w", dataclasses.replace(encoding, **wrong))  # type: ignore[arg-type]

"""Tensors on the grid of an encoding: codes and back, whether a tensor lies on it, and codes packed into bytes.

All pure functions of tensors. Codes are uint8 of the tensor's own shape, 0 to 2^bits - 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deploytool.encoding import FEWEST_BITS, MOST_BITS, Encoding
from deploytool.errors import InputRefused


def as_matrix(tensor: Tensor, axis: int | None) -> Tensor:
    """[rows, columns]: `axis` first, the rest flattened in its order; one row without an axis."""
    return tensor.reshape(1, -1) if axis is None else tensor.movedim(axis, 0).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size, axis: int | None) -> Tensor:
    """The tensor of `shape` that `as_matrix` made the matrix of."""
    if axis is None:
        return matrix.reshape(shape)
    moved = [shape[axis], *shape[:axis], *shape[axis + 1 :]]
    return matrix.reshape(moved).movedim(0, axis).contiguous()


def spread(per_group: Tensor, columns: int, group: int) -> Tensor:
    """[rows, columns] from [rows, groups]: every column has the value of its group."""
    if per_group.shape[1] == 1:
        return per_group.expand(-1, columns)
    return per_group.repeat_interleave(group, dim=1)[:, :columns]


def quantize(tensor: Tensor, encoding: Encoding) -> Tensor:
    """The nearest codes, uint8; halves go to the even code, values outside to the first or last."""
    matrix = as_matrix(tensor.detach(), encoding.axis).float()
    columns = matrix.shape[1]
    scale, zero = (spread(t, columns, encoding.group) for t in (encoding.scale, encoding.zero_point))
    codes = (matrix / scale).add_(zero).round_().clamp_(0, encoding.levels - 1).to(torch.uint8)
    return from_matrix(codes, tensor.shape, encoding.axis)


def dequantize(codes: Tensor, encoding: Encoding, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of codes: (code - zero_point) * scale in float32, then rounded to `dtype`."""
    matrix = as_matrix(codes, encoding.axis).float()
    columns = matrix.shape[1]
    scale, zero = (spread(t, columns, encoding.group) for t in (encoding.scale, encoding.zero_point))
    return from_matrix(matrix.sub_(zero).mul_(scale).to(dtype), codes.shape, encoding.axis)


def snap(tensor: Tensor, encoding: Encoding) -> Tensor:
    """The nearest tensor on the grid, of the tensor's own type."""
    return dequantize(quantize(tensor, encoding), encoding, tensor.dtype)


def lies_on(tensor: Tensor, encoding: Encoding) -> bool:
    """Whether every value is exactly one of the grid's."""
    return fits(tensor.shape, encoding) and torch.equal(snap(tensor, encoding), tensor.detach())


def fits(shape: torch.Size, encoding: Encoding) -> bool:
    """Whether the encoding has one scale per row and group of a tensor of this shape."""
    axis = encoding.axis
    if axis is not None and axis >= len(shape):
        return False
    rows = 1 if axis is None else shape[axis]
    columns = shape.numel() // max(rows, 1)
    return tuple(encoding.scale.shape) == (rows, -(-columns // encoding.group))


def check_encoding(name: str, encoding: Encoding) -> Encoding:
    """The encoding itself; raises InputRefused when it is none, as a damaged file may hold."""
    wrong = None
    scale, zero = encoding.scale, encoding.zero_point
    if not FEWEST_BITS <= encoding.bits <= MOST_BITS or encoding.group < 1:
        wrong = f"{encoding.bits} bits, groups of {encoding.group}"
    elif scale.dtype != torch.float32 or zero.dtype != torch.float32 or scale.ndim != 2 or scale.shape != zero.shape:
        wrong = f"scale {scale.dtype} {list(scale.shape)}, zero point {zero.dtype} {list(zero.shape)}"
    elif not bool((scale.isfinite() & (scale > 0) & zero.isfinite()).all()):
        wrong = "a scale or zero point that is no finite number, or a scale that is not above zero"
    if wrong:
        raise InputRefused("DT314", f"the encoding of {name!r} must have {FEWEST_BITS} to {MOST_BITS} bits, and finite "
                           f"float32 scales above zero with as many zero points (got {wrong})")  # fmt: skip
    return encoding


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as uint8 [ceil(n * bits / 8)], without gaps, the first code in the lowest bits of the first byte."""
    flat = codes.reshape(-1).to(torch.int64)
    per_block = 8  # codes: `bits` whole bytes
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % per_block)).view(-1, per_block)
    words = (flat << (torch.arange(per_block) * bits)).sum(1)  # at most 64 bits: the sum is a bitwise or
    whole: Tensor = ((words[:, None] >> (torch.arange(bits) * 8)) & 0xFF).to(torch.uint8)
    return whole.reshape(-1)[: -(-codes.numel() * bits // 8)].clone()


def unpack(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """The codes of `shape`, uint8, that `pack` put into bytes."""
    count = shape.numel()
    if packed.dtype != torch.uint8 or packed.shape != (-(-count * bits // 8),):
        raise InputRefused("DT314", f"packed codes of shape {list(shape)} must be {-(-count * bits // 8)} bytes "
                           f"(got {packed.dtype} {list(packed.shape)})")  # fmt: skip
    data = torch.nn.functional.pad(packed.to(torch.int64), (0, -len(packed) % bits)).view(-1, bits)
    words = (data << (torch.arange(bits) * 8)).sum(1)
    codes = (words[:, None] >> (torch.arange(8) * bits)) & (2**bits - 1)
    flat: Tensor = codes.reshape(-1)[:count].to(torch.uint8)
    return flat.view(shape)

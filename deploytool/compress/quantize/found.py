"""Finds the grid on which weights already lie: those of a model that was quantized before and read back as floats.

Rounding such weights to another grid loses quality for nothing; on their own grid they are stored without loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deploytool.compress.quantize.ranges import in_groups
from deploytool.encoding import Encoding
from deploytool.load.grid import dequantize, quantize

GROUPS = (256, 128, 64, 32, 16)  # and the whole row
_FEWEST = 8  # values: fewer lie on some grid by chance
_NEAR = 2e-3  # of a step: how far a value that was rounded to half precision or float32 may lie from its code
_SAME = 1e-5  # of the largest weight: how far the encoded matrix may be from the given one


def find_grid(matrix: Tensor, bits: int = 4, groups: tuple[int, ...] = GROUPS) -> Encoding | None:
    """The encoding (axis 0) that gives a matrix [rows, columns] back, with the largest group that does; None if none.

    Offsets need not be whole numbers of steps: formats that store a minimum per group have such.
    """
    matrix = matrix.detach().float()
    columns = matrix.shape[1]
    for group in sorted({columns, *groups}, reverse=True):
        if group > columns or group < _FEWEST:
            continue
        if _grid_of(matrix[:1], bits, group) is None:  # one row tells most matrices apart
            continue
        encoding = _grid_of(matrix, bits, group)
        if encoding is not None:
            return encoding
    return None


def _grid_of(matrix: Tensor, bits: int, group: int) -> Encoding | None:
    cut = in_groups(matrix, group).double()
    short = -matrix.shape[1] % group
    if short:  # the filled-up columns repeat a real one: a zero need not lie on the grid
        cut[:, -1, -short:] = cut[:, -1, :1]
    low, high = cut.amin(2, keepdim=True), cut.amax(2, keepdim=True)
    span = high - low
    step = torch.zeros_like(span)
    for steps in range(1, 2**bits):  # the fewest steps that hit every value: the coarsest grid
        open_ = (step == 0) & (span > 0)
        if not bool(open_.any()):
            break
        tried = span / steps
        place = (cut - low) / tried.masked_fill(span == 0, 1.0)
        hit = ((place - place.round()).abs().amax(2, keepdim=True) < _NEAR) & open_
        step = torch.where(hit, tried, step)
    if bool(((step == 0) & (span > 0)).any()):
        return None
    step = torch.where(span == 0, low.abs().masked_fill(low == 0, 1.0), step)
    place = ((cut - low) / step).round()
    encoding = Encoding(bits, 0, group, *_parameters(cut, place, step, low, 2 ** (bits - 1)))
    off = (dequantize(quantize(matrix, encoding), encoding) - matrix).abs().max()
    return encoding if bool(off <= _SAME * matrix.abs().max()) else None


def _parameters(cut: Tensor, place: Tensor, step: Tensor, low: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """scale and zero point [rows, groups], float32, by least squares of the values on their places from `low` on.

    A zero point that is a whole number is moved to the middle of the codes where all codes of its group still fit.
    """
    middle, mean = place.mean(2, keepdim=True), cut.mean(2, keepdim=True)
    variance = (place - middle).square().sum(2, keepdim=True)
    slope = ((place - middle) * (cut - mean)).sum(2, keepdim=True) / variance.masked_fill(variance == 0, 1.0)
    scale = torch.where(variance > 0, slope, step)
    zero = torch.where(variance > 0, middle - mean / scale, -low / scale)
    counted = place - zero.round()
    power = counted.square().sum(2, keepdim=True)
    through = torch.where(power > 0, (cut * counted).sum(2, keepdim=True) / power.masked_fill(power == 0, 1.0), scale)
    near = (zero - zero.round()).abs() < _NEAR
    pairs = ((scale, zero), (through, zero.round()))
    free, bound = ((s * (place - z) - cut).abs().amax(2, keepdim=True) for s, z in pairs)
    whole = near & (bound <= 2 * free + 1e-7 * cut.abs().amax(2, keepdim=True))
    scale = torch.where(whole, through, scale)
    zero = torch.where(whole, zero.round(), zero)
    first, last = half - zero, half - zero + place.amax(2, keepdim=True)
    movable = whole & (first >= 0) & (last <= 2 * half - 1)
    zero = zero.masked_fill(movable, half)
    return scale.squeeze(2).float(), zero.squeeze(2).float()

"""Chooses the grid of a weight matrix: scale and zero point of every row and group, from the values alone.

Nothing but tensors here. The search over shrunken ranges weighs a few clipped outliers against finer steps for all
others. With `importance` the error is that of the layer's outputs: the quadratic form of the inputs' second moments
(Nagel et al., "Up or down? Adaptive rounding for post-training quantization", ICML 2020, equation 9), or its diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from deploytool.encoding import Encoding

SHRINKS = tuple(1.0 - 0.03 * step for step in range(21))  # 1.00 down to 0.40 of the range between the extremes


def in_groups(matrix: Tensor, group: int) -> Tensor:
    """[rows, groups, group] of a matrix [rows, columns]; a short last group is filled up with zeros."""
    filled = pad(matrix, (0, -matrix.shape[1] % group))
    return filled.view(len(matrix), -1, group)


def extremes(matrix: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The smallest and largest value of every group, [rows, groups] each; 0 always lies between them."""
    cut = in_groups(matrix, group)
    return cut.amin(2).clamp(max=0), cut.amax(2).clamp(min=0)


def grid_between(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """scale and zero point that reach from `low` (at most 0) to `high` (at least 0); 0 is always on the grid.

    Symmetric grids have one step more below 0 than above and use it where the range is longer below. Where both are 0
    the scale is 1.
    """
    levels = 2**bits
    wide = torch.maximum(high / (levels // 2 - 1), -low / (levels // 2)) if symmetric else (high - low) / (levels - 1)
    empty = (high - low) == 0
    scale = wide.clamp(min=torch.finfo(torch.float32).tiny).masked_fill(empty, 1.0)
    if symmetric:
        return scale, torch.full_like(scale, levels // 2)
    return scale, (-low / scale).round().clamp(0, levels - 1)


def choose(
    matrix: Tensor, bits: int, group: int, symmetric: bool, *, importance: Tensor | None = None,
    shrinks: Sequence[float] = (1.0,),
) -> Encoding:  # fmt: skip
    """The encoding (axis 0) of a matrix [rows, columns], the best of all `shrinks` for every group by itself.

    Best is the smallest sum of importance * (value - value on the grid)^2 where `importance` is [columns], and the
    smallest d M d^T where it is [columns, columns]: M the group's part of it, d the group's errors. 1 when not given.
    """
    matrix = matrix.detach().float()
    low, high = extremes(matrix, group)
    scale, zero = grid_between(low, high, bits, symmetric)
    if len(shrinks) > 1:
        cut = in_groups(matrix, group)
        weight = None if importance is None else _weights(importance.float(), group)
        least = _error(cut, scale, zero, bits, weight)
        for shrink in shrinks:
            if shrink == 1.0:
                continue
            other_scale, other_zero = grid_between(low * shrink, high * shrink, bits, symmetric)
            error = _error(cut, other_scale, other_zero, bits, weight)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, other_scale, scale), torch.where(better, other_zero, zero)
    return Encoding(bits, 0, group, scale.contiguous(), zero.contiguous())


def _weights(importance: Tensor, group: int) -> Tensor:
    """[groups, group] of a vector; [groups, group, group], the diagonal blocks, of a matrix."""
    if importance.ndim == 1:
        return in_groups(importance[None], group)[0]
    filled = pad(importance, (0, -len(importance) % group) * 2)
    return torch.stack([filled[at : at + group, at : at + group] for at in range(0, len(filled), group)])


def _error(cut: Tensor, scale: Tensor, zero: Tensor, bits: int, weight: Tensor | None) -> Tensor:
    """[rows, groups]: the error of every group [rows, groups, group] on its grid, as `choose` measures it."""
    scale, zero = scale[..., None], zero[..., None]
    off = (cut / scale).add_(zero).round_().clamp_(0, 2**bits - 1).sub_(zero).mul_(scale).sub_(cut)
    if weight is None:
        return off.square_().sum(2)
    if weight.ndim == 2:
        return off.square_().mul_(weight).sum(2)
    through = torch.bmm(off.transpose(0, 1), weight)  # [groups, rows, group]
    return through.mul_(off.transpose(0, 1)).sum(2).T

"""SparseGPT: pruning as a sequence of small regressions, column by column, with the inverse of the inputs' moments.

    H = X^T X + lambda I,  H^-1 = U^T U with U upper triangular
    a weight costs  w[j]^2 / U[j, j]^2;  pruning column j moves the later ones by  -(w[:, j] - q) / U[j, j] U[j, j:]

Source: Frantar and Alistarh, "SparseGPT: Massive language models can be accurately pruned in one-shot", ICML 2023,
algorithm 1 and section 3.

The sweep never comes back to a column: what is pruned late is made good for by the columns after it only. So the kept
weights, all of them, are fitted once more for the mask that it found (`repair.fit_kept`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deploytool.compress.matrices import gram
from deploytool.compress.prune.by_block import Layer, Pruned, prune_by_block
from deploytool.compress.prune.pattern import keep_but_smallest, keep_of_groups
from deploytool.compress.prune.repair import fit_kept
from deploytool.compress.prune.tables import SparseGpt
from deploytool.compress.quantize.gptq import inverse_root
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.step import Context
from deploytool.encoding import Encoding
from deploytool.load.grid import spread
from deploytool.source import Source


def root_of(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """U of the formula above, float64, from X^T X [n, n], and the damping that it took; see `gptq.inverse_root`.

    Inputs that are always zero count as independent of all others.
    """
    h = moments.double().clone()
    h.diagonal().masked_fill_(h.diagonal() == 0, float(h.diagonal().mean()) or 1.0)
    return inverse_root(h, damping)


def sparsify(
    weight: Tensor,
    root: Tensor,
    share: float,
    kept_of: tuple[int, int] | None = None,
    *,
    block: int = 128,
    before: Tensor | None = None,
    grid: Encoding | None = None,
) -> tuple[Tensor, Tensor]:
    """The pruned weight [out, in] and its mask (False at zeros), from W [out, in] and `root_of`'s U [in, in].

    Every `block` columns lose round(share * out * block) weights, or with `kept_of` = (N, M) every M neighbours all
    but N. Where `before` [out, in] is False the weight is pruned first. With `grid` what is kept is rounded to it, and
    the later columns make good for the rounding too (section 3.5).
    """
    rows, columns = weight.shape
    step = block if kept_of is None else -(-block // kept_of[1]) * kept_of[1]
    w = weight.detach().float().T.contiguous()  # [in, out]: a column of the weight is contiguous
    keep = torch.ones(columns, rows, dtype=torch.bool)
    old = None if before is None else before.T
    if grid is not None:
        scale, zero = (spread(t, columns, grid.group).T.contiguous() for t in (grid.scale, grid.zero_point))
    u = root.float()
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        part, inner = w[start:stop], u[start:stop, start:stop].contiguous()
        errors = torch.empty_like(part)
        if kept_of is None:
            cost = _cost(part, inner.diagonal(), old, start)
            keep[start:stop] = keep_but_smallest(cost, round(share * cost.numel()))
        for j in range(stop - start):
            if kept_of is not None and j % kept_of[1] == 0:
                group = slice(j, j + kept_of[1])
                cost = _cost(part[group], inner.diagonal()[group], old, start + j)
                keep[start + j : start + j + kept_of[1]] = keep_of_groups(cost.T, *kept_of).T
            if old is not None:
                keep[start + j] &= old[start + j]
            new = part[j] if grid is None else _round(part[j], scale[start + j], zero[start + j], grid.levels)
            new = new * keep[start + j]
            torch.div(part[j] - new, inner[j, j], out=errors[j])
            part[j] = new
            part[j + 1 :].addr_(inner[j, j + 1 :], errors[j], alpha=-1)
        w[stop:].addmm_(u[start:stop, stop:].T, errors, alpha=-1)
    return w.T.contiguous().to(weight.dtype), keep.T.contiguous()


def apply(
    source: Source, settings: SparseGpt, context: Context, *, in_place: bool = False
) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers, block by block; layers that read the same tensor share one inverse.

    `in_place` is that of `prune_by_block`.
    """
    held: list[Any] = [None, None]  # the total that the root was made of; layers that share it follow one another

    def prune(layer: Layer) -> Pruned:
        if held[0] is not layer.total:
            held[:] = [layer.total, root_of(layer.total, settings.damping)]
        root, damping = held[1]
        target = layer.weight
        moments, wanted = _wanted(layer.original or (target, layer.total), layer.total, damping)
        if layer.original is not None:
            target = (wanted @ (root.T @ root)).to(layer.weight.dtype)
        grid = None if settings.bits is None else choose(target, settings.bits, settings.group, symmetric=False)
        new, mask = sparsify(target, root, settings.share, settings.kept_of, block=settings.block, before=layer.before,
                             grid=grid)  # fmt: skip
        if grid is None:
            new = fit_kept(new, mask, moments, wanted)
        return Pruned(new, mask, {"damping": damping, "error": relative_error(target, new, layer.total)}, grid)

    return prune_by_block(source, settings, context, gram, prune, in_place=in_place)


def _round(column: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The nearest values of a grid, as `load.grid` computes them."""
    return (column / scale).add_(zero).round_().clamp_(0, levels - 1).sub_(zero).mul_(scale)


def _wanted(original: tuple[Tensor, Tensor], total: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """G + l I, and B = W (C + l I): the fit makes W' (G + l I) as near to B as it can.

    With C = G and the weight of now that is what the layer gave for the rows that it reads.
    """
    weight, cross = original
    ridge = damping * float(total.diagonal().mean()) or 1.0
    damped = total.clone()
    damped.diagonal().add_(ridge)
    if cross is total:  # the fit is in float32
        return damped, weight.float() @ damped.float()
    wanted = cross.clone()
    wanted.diagonal().add_(ridge)
    return damped, weight.double() @ wanted


def relative_error(weight: Tensor, new: Tensor, moments: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2 for weights [out, in] and X^T X [in, in]."""
    difference, moments = (weight - new).float(), moments.float()
    lost = float(((difference @ moments) * difference).sum())
    whole = float(((weight.float() @ moments) * weight).sum())
    return lost / whole if whole > 0 else 0.0


def _cost(part: Tensor, diagonal: Tensor, before: Tensor | None, start: int) -> Tensor:
    """What pruning each weight costs, [columns, out]; nothing for what is pruned already."""
    cost = (part / diagonal[:, None]).square_()
    return cost if before is None else cost.masked_fill_(~before[start : start + len(part)], 0.0)

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
from deploytool.compress.quantize.gptq import ridge_of, root_of
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.step import Context
from deploytool.compress.sweep import sweep
from deploytool.encoding import Encoding
from deploytool.load.grid import spread
from deploytool.source import Source

_FIT = 6  # iterations, each a product as large as W H: on SmolLM2-135M they bring 95 % of what thirty do


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
    width = block if kept_of is None else -(-block // kept_of[1]) * kept_of[1]
    together = width if kept_of is None else kept_of[1]  # columns whose masks are chosen together
    w = weight.detach().float().T.contiguous()  # [in, out]: a column of the weight is contiguous
    keep = torch.ones(columns, rows)
    lost = torch.empty(columns, rows)
    u = root.float()
    diagonal = u.diagonal()[:, None]
    if grid is not None:
        scale, zero = (spread(t, columns, grid.group).T.contiguous() for t in (grid.scale, grid.zero_point))

    def choose_from(start: int) -> None:
        now = slice(start, start + together)
        cost = (w[now] / diagonal[now]).square_()
        if before is not None:
            cost.masked_fill_(~before.T[now], 0.0)
        keep[now] = _kept(cost, share, kept_of)
        if before is not None:
            keep[now] *= before.T[now]
        torch.div(1 - keep[now], diagonal[now], out=lost[now])

    def settle(j: int, column: Tensor, error: Tensor) -> None:
        if j % together == 0:
            choose_from(j)
        if grid is None:
            torch.mul(column, lost[j], out=error)
            column.mul_(keep[j])
        else:
            new = _round(column, scale[j], zero[j], grid.levels).mul_(keep[j])
            torch.sub(column, new, out=error).div_(diagonal[j])
            column.copy_(new)

    sweep(w, u, settle, width=width, together=1 if kept_of is None else together)
    return w.T.contiguous().to(weight.dtype), keep.bool().T.contiguous()


def apply(
    source: Source, settings: SparseGpt, context: Context, *, in_place: bool = False
) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers, block by block; layers that read the same tensor share one inverse.

    `in_place` is that of `prune_by_block`.
    """
    held: list[Any] = [None, None]  # the total that the root was made of; layers that share it follow one another

    def prune(layer: Layer) -> Pruned:
        if held[0] is not layer.total:
            held[:] = [layer.total, root_of(layer.total, settings.damping, fine=layer.original is not None)]
        root, damping = held[1]
        ridge = ridge_of(layer.total, damping)
        h = _ridged(layer.total.float(), ridge)
        if layer.original is None:
            target, wanted = layer.weight, layer.weight.float() @ h
        else:
            weight, cross = layer.original
            wanted = weight.double() @ _ridged(cross, ridge)
            target = (wanted @ (root.T @ root)).to(layer.weight.dtype)
        grid = None if settings.bits is None else choose(target, settings.bits, settings.group, symmetric=False)
        new, mask = sparsify(target, root, settings.share, settings.kept_of, block=settings.block, before=layer.before,
                             grid=grid)  # fmt: skip
        new, left = fit_kept(new, mask, h, wanted, iterations=_FIT if grid is None else 0)
        told = {"damping": damping, "error": relative_error(target, new, wanted, left, ridge)}
        return Pruned(new, mask, told, grid)

    return prune_by_block(source, settings, context, gram, prune, in_place=in_place)


def _kept(cost: Tensor, share: float, kept_of: tuple[int, int] | None) -> Tensor:
    """Bool mask [columns, out] of what stays, by what pruning each weight costs."""
    if kept_of is None:
        return keep_but_smallest(cost, round(share * cost.numel()))
    return keep_of_groups(cost.T, *kept_of).T


def _round(column: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The nearest values of a grid, as `load.grid` computes them."""
    return (column / scale).add_(zero).round_().clamp_(0, levels - 1).sub_(zero).mul_(scale)


def _ridged(moments: Tensor, ridge: Tensor) -> Tensor:
    """A copy of G or C [n, n] with the ridge added to its diagonal."""
    made = moments.clone()
    made.diagonal().add_(ridge)
    return made


def relative_error(weight: Tensor, new: Tensor, wanted: Tensor, left: Tensor, ridge: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2, of B = W (X^T X + L) and B - W' (X^T X + L), which the fit has made."""

    def norm(difference: Tensor, product: Tensor) -> float:
        return float((product * difference).sum() - (difference.square() @ ridge.to(difference)).sum())

    whole = norm(weight.float(), wanted)
    return max(norm(weight.float() - new, left), 0.0) / whole if whole > 0 else 0.0

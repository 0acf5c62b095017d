"""GPTQ: weights are rounded column by column, and the columns not rounded yet make good what was lost.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023 (arXiv 2210.17323), section 3.3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from deploytool.compress.blocks import Block, walk_blocks
from deploytool.compress.matrices import matrix
from deploytool.compress.quantize.layers import (
    chosen_layers,
    group_of,
    put_on,
    refuse_none,
    shrinks_of,
    weight_name,
)
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.tables import Gptq
from deploytool.compress.step import Context
from deploytool.compress.sweep import sweep
from deploytool.compress.turns import Turns
from deploytool.encoding import Encoding
from deploytool.errors import BackendFailed
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

_BLOCK = 128  # columns whose updates of all later columns are made together
_RAISES = 6  # times that damping grows tenfold before we give up


@dataclass(frozen=True)
class Rounding:
    """How columns are rounded: `grid` gives the encoding of columns of W; see `tables.Gptq` for the others."""

    grid: Callable[[Tensor], Encoding]  # columns of W [rows, n] -> their encoding
    order: str
    static_groups: bool
    damping: float


def inverse_root(moments: Tensor, damping: float) -> tuple[Tensor, float]:
    """U [n, n], upper triangular, with (H + d I)^-1 = U^T U, and the damping that it took.

    H [n, n] is symmetric, without zeros on its diagonal; d = damping * mean of its diagonal. Where rounding
    errors keep H + d I from being positive definite, damping grows tenfold. Raises BackendFailed when that is no help.
    """
    # H = R R^T with R upper triangular is the Cholesky factor of H read backwards; U = R^-1, and reading backwards and
    # inverting may change places. Few matrices of this size at once: they are what takes memory here.
    backwards = moments.flip(0, 1)
    mean, before = float(moments.diagonal().mean()), 0.0
    for _ in range(_RAISES):
        backwards.diagonal().add_((damping - before) * mean)
        lower, failed = torch.linalg.cholesky_ex(backwards)
        if not int(failed):
            del backwards
            inverse = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            return inverse.flip(0, 1), damping
        damping, before = 10 * damping, damping
    raise BackendFailed("DT504", "the second moments of a layer's inputs must become positive definite with damping "
                        f"(got none up to {damping / 10:g})",
                        fix="give more calibration samples, or exclude the layer")  # fmt: skip


def root_of(
    moments: Tensor, damping: float, order: Tensor | None = None, *, fine: bool = False
) -> tuple[Tensor, float]:
    """U of X^T X [n, n] float64, its columns in an order [n], and the damping that it took; see `inverse_root`.

    Inputs that are always zero count as independent of all others. Float64 with `fine`, else float32, but computed in
    float64 where float32 is not enough.
    """
    strength = _strength(moments)
    if order is None:
        order = torch.arange(len(moments))

    def root(kind: torch.dtype) -> tuple[Tensor, float]:
        ordered = moments.to(kind)[order][:, order]
        ordered.diagonal().copy_(strength[order])
        return inverse_root(ordered, damping)

    if not fine:
        with suppress(BackendFailed):
            found, took = root(torch.float32)
            if took == damping:
                return found, took
    found, took = root(torch.float64)
    return found if fine else found.float(), took


def ridge_of(moments: Tensor, damping: float) -> Tensor:
    """The diagonal L [n] of X^T X + L: `damping` times the mean of that of X^T X [n, n].

    Inputs that are always zero count as independent of all others, and get that mean besides.
    """
    strength = _strength(moments)
    return strength - moments.diagonal() + damping * strength.mean()


def gptq(
    weight: Tensor, moments: Tensor, how: Rounding, keep: Tensor | None = None
) -> tuple[Tensor, Encoding, float, Tensor]:
    """Rounded W, its encoding, the damping that it took, and ||(w - q) X^T||^2 of every row w, [rows].

    weight [rows, n]; moments [n, n] float64: sum of x x^T over the inputs; `keep` bool [rows, n]: False stays zero.
    Inputs that were always zero are rounded to nearest.
    """
    n = weight.shape[1]
    order = torch.arange(n)
    if how.order == "activation":
        order = torch.argsort(_strength(moments), descending=True, stable=True)
    root, damping = root_of(moments, how.damping, order)
    encoding = how.grid(weight)
    scale, zero = encoding.scale.T.contiguous(), encoding.zero_point.T.contiguous()  # [groups, rows]
    group, last = encoding.group, encoding.levels - 1
    static = how.static_groups or how.order == "activation"
    columns = weight.float().T[order].contiguous()  # [n, rows]: a column of W is one run of memory
    kept = None if keep is None else keep.T[order]
    places, diagonal = (order // group).tolist(), root.diagonal().tolist()

    def settle(index: int, column: Tensor, error: Tensor) -> None:
        place = places[index]
        if not static and index % group == 0:
            now = how.grid(columns[index : index + group].T)
            scale[place], zero[place] = now.scale[:, 0], now.zero_point[:, 0]
        steps, shift = scale[place], zero[place]
        rounded = (column / steps).add_(shift).round_().clamp_(0, last).sub_(shift).mul_(steps)
        if kept is not None:
            rounded.masked_fill_(~kept[index], 0.0)
        torch.sub(column, rounded, out=error).div_(diagonal[index])
        column.copy_(rounded)

    # a group's grid is chosen from columns up to date
    lost = sweep(columns, root, settle, width=_BLOCK if static else group * max(1, _BLOCK // group))
    rounded = torch.empty_like(columns)
    rounded[order] = columns
    final = replace(encoding, scale=scale.T.contiguous(), zero_point=zero.T.contiguous())
    rounded = rounded.T.contiguous()
    lost -= (weight.float() - rounded).square_() @ ridge_of(moments, damping).float()
    return rounded, final, damping, lost.clamp_(min=0)


def _strength(moments: Tensor) -> Tensor:
    """The diagonal of the moments [n], with its mean where it is zero."""
    diagonal = moments.diagonal()
    return diagonal.masked_fill(diagonal == 0, float(diagonal.mean()) or 1.0)


def apply(
    source: Source, settings: Gptq, context: Context, *, bits: Mapping[str, int] | None = None, in_place: bool = False
) -> tuple[Source, dict[str, Any]]:
    """Quantize the chosen layers of a copy, block by block, each on what the quantized blocks before it give.

    `bits` has the widths of layers that do not get `settings.bits`. `in_place` changes the given source's module, for
    callers that need it no more: weights that lie in memory are then held once.
    """
    work = source if in_place else with_module(source, shell(source.module))
    picked, skipped = chosen_layers(work.module, settings)
    encodings: dict[str, Encoding] = {}
    layers: list[dict[str, Any]] = []
    turns = Turns(context.calibration.precision)
    for block in walk_blocks(work, picked, context.samples(source)):
        with turns.finishing(block):
            for names, moments, width in _sharing(turns, block, settings.bits, bits or {}):
                done = _quantize_together(block, names, moments, settings.model_copy(update={"bits": width}),
                                          source.masks)  # fmt: skip
                for name, (entry, encoding) in done.items():
                    encodings[weight_name(name)] = encoding
                    layers.append({"layer": name, **entry})
        context.progress(f"gptq: {block.name or 'the model'} ({len(layers)} of {len(picked)} layers)")
    seen = {entry["layer"] for entry in layers}
    skipped += [{"layer": n, "reason": "no calibration sample reached it"} for n in picked if n not in seen]
    refuse_none("gptq", layers, skipped)
    raised = [entry["layer"] for entry in layers if entry["damping"] > settings.damping]
    if raised:
        context.progress(f"gptq: damping was raised for {len(raised)} layers, {', '.join(raised[:3])} ...")
    report = {"layers": layers, "skipped": skipped, "damping_raised": raised, "precision": turns.precision}
    return replace(work, encodings={**source.encodings, **encodings}), report


def _sharing(
    turns: Turns, block: Block, usual: int, bits: Mapping[str, int]
) -> Iterator[tuple[list[str], Tensor, int]]:
    """Layers of a turn that get as many bits, with their input's second moments and the bits, turn after turn."""
    for totals in turns.totals(block):
        groups: dict[tuple[int, int], tuple[list[str], Tensor]] = {}
        for name, total in totals.items():
            groups.setdefault((id(total), bits.get(name, usual)), ([], total.sum))[0].append(name)
        yield from ((names, moments, width) for (_, width), (names, moments) in groups.items())


def _quantize_together(
    block: Block, names: Sequence[str], moments: Tensor, settings: Gptq, masks: Mapping[str, Tensor]
) -> dict[str, tuple[dict[str, Any], Encoding]]:
    """Quantize layers that read the same input as one matrix, whose rows are those of all."""
    weights = [matrix(block.layers[name]) for name in names]
    group = group_of(weights[0], settings.group)
    shrinks = shrinks_of(settings)

    def grid(weight: Tensor) -> Encoding:  # the columns that follow make errors good: none counts more than another
        return choose(weight, settings.bits, group, settings.symmetric, shrinks=shrinks)

    how = Rounding(grid, settings.order, settings.static_groups, settings.damping)
    sizes = [len(weight) for weight in weights]
    joined = torch.cat(weights)
    rounded, encoding, damping, lost = gptq(joined, moments, how, _kept(names, weights, masks))
    whole = ((joined.float() @ moments.float()) * joined).sum(dim=1)
    parts = zip(names, rounded.split(sizes), encoding.scale.split(sizes), encoding.zero_point.split(sizes),
                lost.split(sizes), whole.split(sizes), strict=True)  # fmt: skip
    done = {}
    for name, part, scale, zero, off, of in parts:
        mine = replace(encoding, scale=scale.clone(), zero_point=zero.clone())
        error = float(off.sum() / of.sum()) ** 0.5 if float(of.sum()) > 0 else 0.0
        entry = put_on(block.layers[name], mine, part)
        done[name] = ({**entry, "output_error": error, "damping": damping}, mine)
    return done


def _kept(names: Sequence[str], weights: Sequence[Tensor], masks: Mapping[str, Tensor]) -> Tensor | None:
    if not any(weight_name(name) in masks for name in names):
        return None
    pairs = zip(names, weights, strict=True)
    return torch.cat([masks.get(weight_name(n), torch.ones_like(w, dtype=torch.bool)).view(w.shape) for n, w in pairs])

"""GPTQ: weights are rounded column by column, and the columns not rounded yet make good what was lost.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate post-training quantization for generative pre-trained
transformers", ICLR 2023 (arXiv 2210.17323), section 3.3 and algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from deploytool.compress.blocks import Block, walk_blocks
from deploytool.compress.matrices import matrix
from deploytool.compress.quantize.layers import (
    chosen_layers,
    group_of,
    output_error,
    put_on,
    refuse_none,
    shrinks_of,
    weight_name,
)
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.tables import Gptq
from deploytool.compress.step import Context
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


def gptq(weight: Tensor, moments: Tensor, how: Rounding, keep: Tensor | None = None) -> tuple[Tensor, Encoding, float]:
    """Rounded W, its encoding, and the damping that it took.

    weight [rows, n]; moments [n, n] float64: sum of x x^T over the inputs; `keep` bool [rows, n]: False stays zero.
    Inputs that were always zero are rounded to nearest.
    """
    strength = moments.diagonal().clone()
    strength.masked_fill_(strength == 0, float(strength.mean()) or 1.0)
    n = weight.shape[1]
    order = torch.arange(n)
    if how.order == "activation":
        order = torch.argsort(strength, descending=True, stable=True)
    root, damping = _root_in(order, moments, strength, how.damping)
    encoding = how.grid(weight)
    scale, zero = encoding.scale.T.contiguous(), encoding.zero_point.T.contiguous()  # [groups, rows]
    group = encoding.group
    static = how.static_groups or how.order == "activation"
    columns = weight.float().T[order].contiguous()  # [n, rows]: a column of W is one run of memory
    kept = None if keep is None else keep.T[order]

    def grid_of(index: int) -> tuple[Tensor, Tensor]:
        if not static and index % group == 0:
            now = how.grid(columns[index : index + group].T)
            scale[index // group], zero[index // group] = now.scale[:, 0], now.zero_point[:, 0]
        mine = int(order[index]) // group
        return scale[mine], zero[mine]

    width = _BLOCK if static else group * max(1, _BLOCK // group)  # a group's grid is chosen from columns up to date
    for start in range(0, n, width):
        stop = min(start + width, n)
        errors = _sweep(columns[start:stop], root[start:stop, start:stop], partial(_at, grid_of, start),
                        encoding.levels, None if kept is None else kept[start:stop])  # fmt: skip
        columns[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
    rounded = torch.empty_like(columns)
    rounded[order] = columns
    final = replace(encoding, scale=scale.T.contiguous(), zero_point=zero.T.contiguous())
    return rounded.T.contiguous(), final, damping


def _root_in(order: Tensor, moments: Tensor, strength: Tensor, damping: float) -> tuple[Tensor, float]:
    """`inverse_root` of the moments in an order, float32; computed in float64 where float32 is not enough."""

    def root(kind: torch.dtype) -> tuple[Tensor, float]:
        ordered = moments.to(kind)[order][:, order]
        ordered.diagonal().copy_(strength[order])
        return inverse_root(ordered, damping)

    with suppress(BackendFailed):
        found, took = root(torch.float32)
        if took == damping:
            return found, took
    found, took = root(torch.float64)
    return found.float(), took


def _at(grid_of: Callable[[int], tuple[Tensor, Tensor]], start: int, index: int) -> tuple[Tensor, Tensor]:
    return grid_of(start + index)


def _sweep(
    columns: Tensor, root: Tensor, grid_of: Callable[[int], tuple[Tensor, Tensor]], levels: int, kept: Tensor | None
) -> Tensor:
    """Round the columns [n, rows] in place, one after the other; the errors, each divided by its diagonal of U."""
    errors = torch.empty_like(columns)
    for index in range(len(columns)):
        scale, zero = grid_of(index)
        column = columns[index]
        rounded = (column / scale).add_(zero).round_().clamp_(0, levels - 1).sub_(zero).mul_(scale)
        if kept is not None:
            rounded.masked_fill_(~kept[index], 0.0)
        errors[index] = (column - rounded).div_(root[index, index])
        columns[index] = rounded
        columns[index + 1 :].addr_(root[index, index + 1 :], errors[index], alpha=-1)
    return errors


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
    rounded, encoding, damping = gptq(joined, moments, how, _kept(names, weights, masks))
    parts = zip(names, rounded.split(sizes), encoding.scale.split(sizes), encoding.zero_point.split(sizes), weights,
                strict=True)  # fmt: skip
    done = {}
    for name, part, scale, zero, weight in parts:
        mine = replace(encoding, scale=scale.clone(), zero_point=zero.clone())
        error = output_error(weight, part, moments)
        entry = put_on(block.layers[name], mine, part)
        done[name] = ({**entry, "output_error": error, "damping": damping}, mine)
    return done


def _kept(names: Sequence[str], weights: Sequence[Tensor], masks: Mapping[str, Tensor]) -> Tensor | None:
    if not any(weight_name(name) in masks for name in names):
        return None
    pairs = zip(names, weights, strict=True)
    return torch.cat([masks.get(weight_name(n), torch.ones_like(w, dtype=torch.bool)).view(w.shape) for n, w in pairs])

"""AWQ: activation-aware weight quantization.

A weight's rounding error counts by how strong its input is. Scaling the weights of a strong input channel up before
rounding, and the channel itself down, makes that error smaller without a finer grid; the factors vanish in the norm or
linear layer that makes the input.

Source: Lin et al., "AWQ: Activation-aware weight quantization for LLM compression and acceleration", MLSys 2024 (arXiv
2306.00978), section 3.2, equations 4 and 5, and the clipping of its section 4; the second kind of scale, which also
divides by the weights' own size, is that of its public implementation. Here the outputs' errors are not sampled but
computed from the second moments of all calibration inputs, and strength is the root mean square.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, Total, walk_blocks
from deploytool.compress.matrices import gram, matrix
from deploytool.compress.quantize.folding import Folder, per_class
from deploytool.compress.quantize.layers import (
    chosen_layers,
    group_of,
    output_error,
    put_on,
    refuse_none,
    shrinks_of,
    weight_name,
)
from deploytool.compress.quantize.producers import Link
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.tables import Awq
from deploytool.compress.step import Context
from deploytool.encoding import Encoding
from deploytool.load.grid import snap
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

_LEAST = 1e-4  # of the strongest channel: what a channel counts at least


@dataclass(frozen=True)
class Scale:
    """The best scale that was found: `factors` [n]; the outputs' error with it as a share of the error without."""

    factors: Tensor
    exponent: float
    by_weight: bool
    gain: float


def scales(strength: Tensor, size: Tensor, exponents: Sequence[float]) -> list[tuple[float, bool, Tensor]]:
    """What is tried: strength^a, and strength^a / size^(1 - a), [n] each, with 1 in the middle of their range.

    strength [n]: how strong the input channels are; size [n]: how large their weights.
    """
    strength = strength.clamp(min=_LEAST * float(strength.max()) or 1.0)
    size = size.clamp(min=_LEAST * float(size.max()) or 1.0)
    found = []
    for exponent in exponents:
        for by_weight in (False, True) if exponent > 0 else (False,):
            factors = strength**exponent / (size ** (1 - exponent) if by_weight else 1.0)
            found.append((exponent, by_weight, factors / (factors.max() * factors.min()).sqrt()))
    return found


def search_scale(
    weight: Tensor, moments: Tensor, channels: Tensor, grid: tuple[int, int, bool], exponents: Sequence[float]
) -> Scale:
    """The scale with the least error of the outputs of W [rows, n] over inputs with second moments [n, n].

    `channels` [n]: channels with one number must have one factor. grid: bits, group, symmetric.
    """
    form = moments.float()
    strength = per_class(form.diagonal().sqrt(), channels)
    size = per_class(weight.abs().mean(0), channels)
    losses = []
    tried = scales(strength, size, exponents)
    for _, _, factors in tried:
        scaled = weight * factors
        off = snap(scaled, choose(scaled, *grid)).div_(factors).sub_(weight)
        losses.append(float(((off @ form) * off).sum()))
    best = min(range(len(losses)), key=losses.__getitem__)
    exponent, by_weight, factors = tried[best]
    return Scale(factors, exponent, by_weight, losses[best] / losses[0] if losses[0] > 0 else 1.0)


def apply(source: Source, settings: Awq, context: Context, *, in_place: bool = False) -> tuple[Source, dict[str, Any]]:
    """Scale and round the chosen layers of a copy, block by block, each on what the blocks before it give.

    `in_place` changes the given source's module, for callers that need it no more: the weights are then held once.
    """
    work = source if in_place else with_module(source, shell(source.module))
    picked, skipped = chosen_layers(work.module, settings)
    folder = Folder()
    encodings: dict[str, Encoding] = {}
    layers: list[dict[str, Any]] = []
    for block in walk_blocks(work, picked, context.samples(source)):
        totals = block.accumulate(gram)
        found = _scale(block, totals, settings, folder)
        for name in totals:
            entry: dict[str, Any] = {"layer": name, **found.get(name, {"exponent": None})}
            if settings.round:
                done, encodings[weight_name(name)] = _round(block.layers[name], totals[name].sum, settings)
                entry |= done
            layers.append(entry)
        context.progress(f"awq: {block.name or 'the model'} ({len(layers)} of {len(picked)} layers)")
    seen = {entry["layer"] for entry in layers}
    skipped += [{"layer": n, "reason": "no calibration sample reached it"} for n in picked if n not in seen]
    refuse_none("awq", layers, skipped)
    report = {"layers": layers, "skipped": skipped, "not_scaled": [e for e in folder.reasons if e["layer"] in seen]}
    return replace(work, encodings={**source.encodings, **encodings}), report


def _scale(block: Block, totals: Mapping[str, Total], settings: Awq, folder: Folder) -> dict[str, dict[str, Any]]:
    """Scale the inputs of the block's layers; what the report says of each. `totals` become those of scaled inputs."""
    exponents = [i / (settings.exponents - 1) for i in range(settings.exponents)]
    found: dict[str, dict[str, Any]] = {}

    def factors(link: Link, readers: list[str]) -> Tensor | None:
        names = [name for name in readers if name in totals]
        if not names:
            return None
        weight = torch.cat([matrix(block.layers[name]).float() for name in names])
        grid = (settings.bits, group_of(weight, settings.group), settings.symmetric)
        best = search_scale(weight, totals[names[0]].sum, link.channels, grid, exponents)
        told = {"exponent": best.exponent, "by_weight": best.by_weight, "gain": best.gain, "producer": link.producer}
        found.update(dict.fromkeys(names, told))
        return best.factors if best.exponent > 0 else None

    done = folder.fold(block, factors)
    scaled: set[int] = set()
    for name, factor in done.items():
        total = totals.get(name)
        if total is not None and id(total) not in scaled:
            scaled.add(id(total))
            total.sum /= torch.outer(factor, factor).double()
    refused = {entry["layer"] for entry in folder.reasons}
    return {name: told for name, told in found.items() if name not in refused}


def _round(layer: nn.Module, moments: Tensor, settings: Awq) -> tuple[dict[str, Any], Encoding]:
    weight = matrix(layer)
    encoding = choose(weight, settings.bits, group_of(weight, settings.group), settings.symmetric,
                      importance=moments, shrinks=shrinks_of(settings))  # fmt: skip
    entry = put_on(layer, encoding)
    return {**entry, "output_error": output_error(weight, matrix(layer), moments)}, encoding

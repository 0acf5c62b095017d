"""The walk under every pruning step that looks at calibration data: block after block, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from deploytool.compress.blocks import Block, paired_moments, walk_blocks
from deploytool.compress.matrices import Measure, matrix, matrix_layers, set_matrix
from deploytool.compress.prune.pattern import check_widths, not_chosen, zeros_report
from deploytool.compress.prune.tables import SparseGpt, Wanda
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.encoding import Encoding
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source


@dataclass(frozen=True)
class Pruned:
    """A layer's new weight [out, in], its mask (False at zeros that must stay), what the report shall say of it, and
    the grid that the weight lies on, if any."""

    weight: Tensor
    mask: Tensor
    told: dict[str, Any] = field(default_factory=dict)
    grid: Encoding | None = None


@dataclass(frozen=True)
class Layer:
    """What a layer's pruning is decided from.

    weight    [out, in]
    total     the measure's sum over the rows that it reads, float64; the same object for layers that read one tensor
    before    mask of earlier steps [out, in], or None
    original  the weight [out, in] before this step, and C = X0^T X with the rows X0 of then; None without repair
    """

    weight: Tensor
    total: Tensor
    before: Tensor | None
    original: tuple[Tensor, Tensor] | None = None


PruneLayer = Callable[[Layer], Pruned]


def prune_by_block(
    source: Source, settings: Wanda | SparseGpt, context: Context, measure: Measure, prune: PruneLayer
) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers of a copy that shares the other tensors; the masks travel with the source."""
    pruned = with_module(source, shell(source.module))
    candidates, skipped = matrix_layers(pruned.module)
    chosen = select(candidates, settings.include, settings.exclude)
    check_widths({n: matrix(layer).shape[1] for n, layer in candidates.items() if n in chosen}, settings.kept_of)
    skipped += not_chosen(candidates, chosen)
    names, samples = [n for n in candidates if n in chosen], context.samples(source)
    masks, encodings, layers = dict(source.masks), dict(source.encodings), []
    for block, reference in _walk(pruned, source, names, samples, repair=getattr(settings, "repair", False)):
        found = _look(block, reference, measure)
        skipped += [{"layer": n, "reason": "it did not run on the samples"} for n in block.layers if n not in found]
        for name, layer in found.items():
            module, key = block.layers[name], f"{name}.weight".lstrip(".")
            before = masks[key].view(layer.weight.shape) if key in masks else None
            done = prune(replace(layer, before=before))
            mask = done.mask if before is None else done.mask & before
            set_matrix(module, done.weight.masked_fill(~mask, 0.0))
            masks[key] = mask.view(module.get_parameter("weight").shape)
            if done.grid is not None:
                encodings[key] = done.grid
            layers.append({**zeros_report(key, matrix(module)), **done.told})
        context.progress(f"{settings.step}: {block.name or 'the model'}")
    finished = with_module(pruned, pruned.module, masks=masks, encodings=encodings)
    return finished, {"layers": layers, "skipped": skipped}


def _walk(
    pruned: Source, source: Source, names: list[str], samples: list[dict[str, Tensor]], *, repair: bool
) -> Iterator[tuple[Block, Block | None]]:
    """The blocks, and beside each the same block of the model as it was, where the repair is to look at it."""
    blocks = walk_blocks(pruned, names, samples)
    if not repair:
        yield from ((block, None) for block in blocks)
        return
    original = with_module(source, shell(source.module))
    yield from zip(blocks, walk_blocks(original, names, samples), strict=True)


def _look(block: Block, reference: Block | None, measure: Measure) -> dict[str, Layer]:
    """What each layer of the block is pruned by; layers that did not run are left out."""
    weights = {name: matrix(layer) for name, layer in block.layers.items()}
    if reference is None:
        return {n: Layer(weights[n], t.sum, None) for n, t in block.accumulate(measure).items()}
    pairs = paired_moments(reference, block, block.layers)
    old = {name: matrix(layer) for name, layer in reference.layers.items()}
    return {n: Layer(weights[n], m.gram, None, (old[n], m.cross)) for n, m in pairs.items()}

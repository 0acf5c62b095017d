"""The walk under every pruning step that looks at calibration data: block after block, layer after layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from deploytool.compress.blocks import Block, walk_blocks
from deploytool.compress.matrices import Measure, gram, matrix, matrix_layers, set_matrix
from deploytool.compress.prune.pattern import check_widths, not_chosen, zeros_report
from deploytool.compress.prune.tables import SparseGpt, Wanda
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.compress.turns import Turns
from deploytool.encoding import Encoding
from deploytool.load.memory import on_disk
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
    source: Source,
    settings: Wanda | SparseGpt,
    context: Context,
    measure: Measure,
    prune: PruneLayer,
    *,
    in_place: bool = False,
) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers of a copy that shares the other tensors; the masks travel with the source.

    `in_place` changes the given source's module, for callers that need it no more: weights that lie in memory are then
    held once. Where Gram matrices decide, the layers that read one tensor are pruned before the next ones are looked
    at: each makes good for what reaches it once those before it are pruned. All fitted to one look, they would make
    good for it several times.
    """
    original = with_module(source, shell(source.module)) if getattr(settings, "repair", False) else None
    pruned = source if in_place else with_module(source, shell(source.module))
    candidates, skipped = matrix_layers(pruned.module)
    chosen = select(candidates, settings.include, settings.exclude)
    check_widths({n: matrix(layer).shape[1] for n, layer in candidates.items() if n in chosen}, settings.kept_of)
    skipped += not_chosen(candidates, chosen)
    names, samples = [n for n in candidates if n in chosen], context.samples(source)
    masks, encodings, layers = dict(source.masks), dict(source.encodings), []
    turns = Turns(context.calibration.precision)
    for block, reference in _walk(pruned, original, names, samples):
        ran: set[str] = set()
        with turns.finishing(block):
            for name, layer in _looks(turns, block, reference, measure):
                module, key = block.layers[name], f"{name}.weight".lstrip(".")
                before = masks[key].view(layer.weight.shape) if key in masks else None
                done = prune(replace(layer, before=before))
                mask = done.mask if before is None else done.mask & before
                set_matrix(module, done.weight.masked_fill(~mask, 0.0))
                masks[key] = on_disk(mask.view(module.get_parameter("weight").shape))
                if done.grid is not None:
                    encodings[key] = done.grid
                layers.append({**zeros_report(key, matrix(module)), **done.told})
                ran.add(name)
        skipped += [{"layer": n, "reason": "it did not run on the samples"} for n in block.layers if n not in ran]
        context.progress(f"{settings.step}: {block.name or 'the model'} ({len(layers)} of {len(names)} layers)")
    finished = with_module(pruned, pruned.module, masks=masks, encodings=encodings)
    told = {"precision": turns.precision} if measure is gram else {}
    return finished, {"layers": layers, "skipped": skipped, **told}


def _walk(
    pruned: Source, original: Source | None, names: list[str], samples: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[Block, Block | None]]:
    """The blocks, and beside each the same block of the model as it was, where the repair is to look at it."""
    blocks = walk_blocks(pruned, names, samples)
    if original is None:
        yield from ((block, None) for block in blocks)
        return
    yield from zip(blocks, walk_blocks(original, names, samples), strict=True)


def _looks(turns: Turns, block: Block, reference: Block | None, measure: Measure) -> Iterator[tuple[str, Layer]]:
    """What each layer is pruned by, turn after turn; layers that did not run are left out."""
    if reference is not None:
        for pairs in turns.moments(reference, block):
            for name, both in pairs.items():
                old = matrix(reference.layers[name])
                yield name, Layer(matrix(block.layers[name]), both.gram, None, (old, both.cross))
        return
    looks = turns.totals(block) if measure is gram else [block.accumulate(measure)]
    for totals in looks:
        for name, total in totals.items():
            yield name, Layer(matrix(block.layers[name]), total.sum, None)

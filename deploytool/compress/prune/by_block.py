"""The walk under every pruning step that looks at calibration data: block after block, layer after layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deploytool.compress.blocks import Total, walk_blocks
from deploytool.compress.matrices import Measure, copy_sharing, matrix, matrix_layers, set_matrix
from deploytool.compress.prune.pattern import check_widths, not_chosen, zeros_report
from deploytool.compress.prune.tables import SparseGpt, Wanda
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.load.surgery import with_module
from deploytool.source import Source


@dataclass(frozen=True)
class Pruned:
    """A layer's new weight [out, in], its mask (False at zeros that must stay), and what the report shall say of it."""

    weight: Tensor
    mask: Tensor
    told: dict[str, Any] = field(default_factory=dict)


# (weight [out, in], total of the measure over the layer's rows, mask of earlier steps [out, in] or None)
PruneLayer = Callable[[Tensor, Total, Tensor | None], Pruned]


def prune_by_block(
    source: Source, settings: Wanda | SparseGpt, context: Context, measure: Measure, prune: PruneLayer
) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers of a copy that shares the other tensors; the masks travel with the source."""
    pruned = with_module(source, copy_sharing(source.module))
    masks, report = prune_in_place(pruned, settings, context, measure, prune)
    return with_module(pruned, pruned.module, masks=masks), report


def prune_in_place(
    source: Source, settings: Wanda | SparseGpt, context: Context, measure: Measure, prune: PruneLayer
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Give the source's own module pruned weights; all masks by parameter name, and the report."""
    candidates, skipped = matrix_layers(source.module)
    chosen = select(candidates, settings.include, settings.exclude)
    check_widths({n: matrix(layer).shape[1] for n, layer in candidates.items() if n in chosen}, settings.kept_of)
    skipped += not_chosen(candidates, chosen)
    masks, layers = dict(source.masks), []
    for block in walk_blocks(source, [n for n in candidates if n in chosen], context.samples(source)):
        totals = block.accumulate(measure)
        skipped += [{"layer": n, "reason": "it did not run on the samples"} for n in block.layers if n not in totals]
        for name, total in totals.items():
            layer, key = block.layers[name], f"{name}.weight".lstrip(".")
            weight = matrix(layer)
            before = masks[key].view(weight.shape) if key in masks else None
            done = prune(weight, total, before)
            mask = done.mask if before is None else done.mask & before
            set_matrix(layer, done.weight.masked_fill(~mask, 0.0))
            masks[key] = mask.view(layer.get_parameter("weight").shape)
            layers.append({**zeros_report(key, matrix(layer)), **done.told})
        context.progress(f"{settings.step}: {block.name or 'the model'}")
    return masks, {"layers": layers, "skipped": skipped}

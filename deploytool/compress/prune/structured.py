"""Structured pruning: whole heads, neurons and channels go, and the layers that read them make good for it.

Units are found by `discover`, chosen by `refit.removal_order` or by a score, and taken out of every layer that makes or
reads them. These are fitted to what the uncompressed model gives, block after block and in the order in which they run:
the makers to their old outputs, the readers to the old sums that they add to. Nothing is trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, check_samples, walk_blocks
from deploytool.compress.calls import leaves, replay
from deploytool.compress.matrices import matrix, matrix_layers, set_matrix
from deploytool.compress.prune.budget import least_loss, same_share, unit_weights
from deploytool.compress.prune.discover import discover, kind
from deploytool.compress.prune.importance import columns, losses, unit_scores
from deploytool.compress.prune.readings import home, read
from deploytool.compress.prune.refit import ORDER_DAMPING, Reading, best_damping, best_kept, best_weight, removal_order
from deploytool.compress.prune.tables import Structured
from deploytool.compress.prune.units import Group
from deploytool.compress.prune.weighing import Weighing, weigh_errors
from deploytool.compress.select import select
from deploytool.compress.shelf import Shelf
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.load.resize import keep, set_number, sizes
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source

_SAME = 1e-3  # of the largest output: what smaller layers may differ by
_HEADS = re.compile(r"n?(\w+_)?heads?")  # num_heads, n_head, nhead, num_attention_heads; not head_dim


@dataclass
class Removal:
    """What goes from one group: kind, how many units, and in a run which, in what layers.

    `rows` are the outputs [n] that removals before it have left of a layer, by its name, and `masks` what is not zero
    since earlier steps, by the weight's name, as removals have left it; one object each for all removals.
    `fixed` are makers that stay as they are: those that also read units, and those with zeros of earlier steps;
    `weighing` says how much errors of the readers matter, where not alike.
    """

    group: Group
    kind: str
    count: int
    units: list[int]
    rows: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    fixed: frozenset[str] = frozenset()
    masks: dict[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    weighing: Mapping[str, Weighing] = field(default_factory=dict, compare=False, repr=False)


def apply(source: Source, settings: Structured, context: Context) -> tuple[Source, dict[str, Any]]:
    """Remove the chosen share of units from a copy whose untouched tensors are shared."""
    samples = context.samples(source)
    check_samples(samples)
    pruned = with_module(source, shell(source.module))
    layers, skipped = matrix_layers(pruned.module)
    groups, why = discover(pruned, layers, samples)
    skipped += [{"layer": name, "reason": reason} for name, reason in why.items()]
    chosen = _chosen(pruned, groups, settings, skipped)
    weighing = _weighing(source, chosen, settings, samples)
    counts = _counts(source, chosen, settings, samples, weighing)
    rows: dict[str, Tensor] = {}
    masks = dict(source.masks)
    fixed = frozenset(n for g in chosen for n in g.readers) | {n.removesuffix(".weight") for n in source.masks}
    removals = [Removal(g, kind(source, g), c, [], rows, fixed, masks, weighing)
                for g, c in zip(chosen, counts, strict=True) if c or settings.reconstruct]  # fmt: skip
    skipped += [{"layer": name, "reason": "none of its units was worth removing"}
                for g, c in zip(chosen, counts, strict=True) if not c for name in g.makers]  # fmt: skip
    scores = unit_scores(source, [r.group for r in removals], settings, samples)
    edits: list[dict[str, Any]] = []
    told: list[dict[str, Any]] = []
    for block, before, here in _stages(pruned, source, removals, samples):
        for removal in here:
            made = _remove(pruned, block, before, removal, scores[removals.index(removal)], settings)
            if made is None:
                reason = f"without some of its {removal.kind} the model is not what it is when they are ignored"
                skipped += [{"layer": name, "reason": reason} for name in removal.group.makers]
                continue
            if not removal.count:
                continue
            edits += made
            rows.update({n: _kept(removal, n, *sizes(source.module.get_submodule(n)))[1] for n in removal.group.makers})
            _shrink_masks(masks, removal)
            told.append(_told(removal))
            context.progress(f"structured: {removal.count} of {len(removal.group)} {removal.kind} of "
                             f"{', '.join(removal.group.makers)} removed "
                             f"({len(told)} of {len(removals)} groups)")  # fmt: skip
    if not told:
        raise UsageProblem("DT204", "units must be removable from the model (none were)",
                           detail=[f"{entry['layer']}: {entry['reason']}" for entry in skipped[-20:]])  # fmt: skip
    done = with_module(pruned, pruned.module, edits=(*source.edits, *edits), masks=masks)
    return done, {"layers": told, "skipped": skipped}


def _chosen(source: Source, groups: list[Group], settings: Structured, skipped: list[dict[str, str]]) -> list[Group]:
    """The groups of the kinds asked for whose makers are all chosen."""
    makers = [name for group in groups for name in group.makers]
    if not makers:
        raise UsageProblem("DT204", "the model must have units that can be removed (none were found)",
                           detail=[f"{entry['layer']}: {entry['reason']}" for entry in skipped[:20]])  # fmt: skip
    names = select(makers, settings.include, settings.exclude)
    chosen = []
    for group in groups:
        if settings.units and kind(source, group) not in settings.units:
            reason = f"{kind(source, group)} are not among the units to remove"
        elif not names.issuperset(group.makers):
            reason = "not chosen by include and exclude"
        else:
            chosen.append(group)
            continue
        skipped += [{"layer": name, "reason": reason} for name in group.makers]
    if not chosen:
        raise UsageProblem("DT204", f"units must be of a kind that the chosen layers have (got "
                           f"{', '.join(settings.units)})")  # fmt: skip
    return chosen


def _weighing(
    source: Source, groups: list[Group], settings: Structured, samples: Sequence[dict[str, Tensor]]
) -> dict[str, Weighing]:
    if settings.weigh == "alike":
        return {}
    readers = [n for g in groups for n in g.readers if _is_matrix(source, n)]
    return weigh_errors(source, readers, samples, settings.output)


def _counts(
    source: Source, groups: list[Group], settings: Structured, samples: Sequence[dict[str, Tensor]],
    weighing: Mapping[str, Weighing],
) -> list[int]:  # fmt: skip
    """How many units each group gives up."""
    units = [len(group) for group in groups]
    if settings.scope == "layer":
        return same_share(units, settings.remove)
    weights = [unit_weights(source.module, group) for group in groups]
    return least_loss(losses(source, groups, settings, samples, weighing), weights, units, settings.remove)


def _stages(
    pruned: Source, source: Source, removals: list[Removal], samples: Sequence[dict[str, Tensor]]
) -> Iterator[tuple[Block, Block, list[Removal]]]:
    """Blocks of the model that is pruned and of the uncompressed one, with the groups in them.

    When a group reaches over blocks, the whole model is one block.
    """
    matrices = {r.group.makers[0]: [n for n in r.group.readers if _is_matrix(pruned, n)] for r in removals}
    homes = [home(pruned.module, [*r.group.makers, *r.group.readers]) for r in removals]
    if all(place is not None for place in homes):
        names = [n for r in removals for n in (*r.group.makers, *r.group.readers) if _is_matrix(pruned, n)]
        original = with_module(source, shell(source.module))
        pairs = zip(walk_blocks(pruned, names, samples), walk_blocks(original, names, samples), strict=True)
        for block, before in pairs:
            yield block, before, [r for r, place in zip(removals, homes, strict=True) if place == block.name]
        return
    for removal in removals:
        readers = matrices[removal.group.makers[0]]
        yield _whole(pruned, readers, samples), _whole(source, readers, samples), [removal]


def _whole(source: Source, layers: list[str], samples: Sequence[dict[str, Tensor]]) -> Block:
    """The whole model as one block; its calls are the samples."""
    held = {n: source.module.get_submodule(n) for n in layers}
    return Block("", source.module, held, Shelf((((), dict(sample)) for sample in samples), expected=len(samples)))


def _remove(
    pruned: Source, block: Block, before: Block, removal: Removal, scores: Tensor | None, settings: Structured
) -> list[dict[str, Any]] | None:
    """Choose the units, fit the readers and make all layers smaller; the edits, or None when nothing was changed.

    The smaller layers must give what the large ones give with zeros in the removed columns: a model that counts its
    heads in some way of its own is then left as it was.
    """
    names = list(dict.fromkeys([*removal.group.makers, *removal.group.readers]))
    old = {name: pruned.module.get_submodule(name) for name in names}
    _put(pruned, block, {name: shell(layer) for name, layer in old.items()})
    readers = [n for n in removal.group.readers if _is_matrix(pruned, n)]
    if settings.reconstruct and block.name:
        _refit_makers(block, before, removal, settings)
    _ignore(block, before, readers, removal, scores, settings)
    wanted = _first_output(block)
    numbers = _numbers(pruned.module, removal) if removal.kind == "heads" else []
    edits = [_shrink(pruned.module, name, removal) for name in names] + numbers
    try:
        good = all(torch.allclose(a, b, rtol=_SAME, atol=_SAME * float(b.abs().max()))
                   for a, b in zip(_first_output(block), wanted, strict=True))  # fmt: skip
    except RuntimeError:  # shapes that no longer fit
        good = False
    if good:
        return edits
    _put(pruned, block, old)
    for edit in numbers:
        set_number(pruned.module, edit["layer"], edit["attribute"], len(removal.group))
    return None


def _put(pruned: Source, block: Block, layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        replace_layer(pruned.module, name, layer)
        if name in block.layers:
            block.layers[name] = layer


def _first_output(block: Block) -> list[Tensor]:
    output = replay(block.module, block.calls[0])
    return [leaf for leaf in leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _ignore(
    block: Block, before: Block, readers: list[str], removal: Removal, scores: Tensor | None, settings: Structured
) -> None:
    """Choose the units, and give the readers weights with zeros in their columns."""
    if scores is not None:
        removal.units = sorted(scores.argsort(stable=True)[: removal.count].tolist())
    if scores is not None and not settings.reconstruct:
        for name in readers:
            weight = matrix(block.layers[name]).clone()
            weight[:, _gone(columns(block.layers[name], name, removal.group), removal)] = 0
            set_matrix(block.layers[name], weight)
        return
    left = {name: rows for name, rows in removal.rows.items() if name in readers}
    readings = read(before, block, {n: columns(before.layers[n], n, removal.group) for n in readers},
                    whole=block.name != "", left=left, weighing=removal.weighing)  # fmt: skip
    if scores is None:
        removal.units = sorted(removal_order(readings, settings.damping or ORDER_DAMPING, removal.count)[0])
    for name, reading in zip(readers, readings, strict=True):
        if settings.reconstruct:
            _refit(block.layers[name], reading, _gone(reading.columns, removal), settings.damping,
                   removal.masks.get(f"{name}.weight"))  # fmt: skip
        else:
            set_matrix(block.layers[name], reading.weight.index_fill(1, _gone(reading.columns, removal), 0.0)
                       [:, : matrix(block.layers[name]).shape[1]])  # fmt: skip


def _refit_makers(block: Block, before: Block, removal: Removal, settings: Structured) -> None:
    """Fit the layers that make the units to the uncompressed model's, with the inputs that they get by now."""
    makers = [name for name in removal.group.makers if name in block.layers and name not in removal.fixed]
    for name, reading in zip(makers, read(before, block, {n: [] for n in makers}, whole=False) if makers else (),
                             strict=True):  # fmt: skip
        _refit(block.layers[name], reading, torch.empty(0, dtype=torch.int64), settings.damping)


def _gone(each: list[Tensor], removal: Removal) -> Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(each[unit] for unit in removal.units)])


def _refit(
    layer: nn.Module, reading: Reading, gone: Tensor, damping: float | None, mask: Tensor | None = None
) -> None:  # fmt: skip
    """The best weight without the columns `gone`, with zeros there and where the `mask` of the weight is False."""
    kept = torch.ones(reading.weight.shape[1], dtype=torch.bool)
    kept[gone] = False
    left = kept.nonzero().flatten()
    chosen = damping or best_damping(reading, left)
    best = best_weight(reading.weight, reading.gram, reading.wanted, left, chosen)
    full = torch.zeros_like(reading.weight)
    full[:, kept] = best
    width = matrix(layer).shape[1]
    if mask is not None:
        kept = kept.repeat(len(full), 1)
        kept[:, :width] &= mask.reshape(len(full), -1)
        full = best_kept(full, reading, kept, chosen)
    set_matrix(layer, full[:, :width])
    if full.shape[1] > width:
        layer.bias = nn.Parameter(full[:, width].to(matrix(layer).dtype), requires_grad=False)


def _shrink(module: nn.Module, name: str, removal: Removal) -> dict[str, Any]:
    """Take the units out of one layer of the group; the edit that makes the same shape."""
    layer = module.get_submodule(name)
    inputs, outputs = _kept(removal, name, *sizes(layer))
    if not _has_columns(layer):
        outputs = inputs
    keep(layer, inputs, outputs)
    return {"kind": "resize", "layer": name, "inputs": len(inputs), "outputs": len(outputs)}


def _shrink_masks(masks: dict[str, Tensor], removal: Removal) -> None:
    """Masks of earlier steps, in the new shapes."""
    for name in dict.fromkeys([*removal.group.makers, *removal.group.readers]):
        mask = masks.get(f"{name}.weight")
        if mask is not None:
            inputs, outputs = _kept(removal, name, mask.shape[1], mask.shape[0])
            masks[f"{name}.weight"] = mask.index_select(0, outputs).index_select(1, inputs)


def _kept(removal: Removal, name: str, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
    """The input and output channels of a layer that stay."""
    kept = []
    for size, units in ((inputs, removal.group.inputs), (outputs, removal.group.outputs)):
        gone = {channel for unit in removal.units for channel in units[unit].get(name, [])}
        kept.append(torch.tensor([channel for channel in range(size) if channel not in gone], dtype=torch.int64))
    return kept[0], kept[1]


def _numbers(module: nn.Module, removal: Removal) -> list[dict[str, Any]]:
    """Set the attributes that say how many heads there are, in the modules that hold the layers; the edits for it."""
    old, new = len(removal.group), len(removal.group) - removal.count
    edits = []
    for parent in sorted({name.rpartition(".")[0] for name in removal.group.makers}):
        held = vars(module.get_submodule(parent)).items()
        for attribute in [a for a, v in held if type(v) is int and v == old and _HEADS.fullmatch(a)]:
            set_number(module, parent, attribute, new)
            edits.append({"kind": "number", "layer": parent, "attribute": attribute, "value": new})
    return edits


def _is_matrix(source: Source, name: str) -> bool:
    return _has_columns(source.module.get_submodule(name))


def _has_columns(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.modules.batchnorm._BatchNorm)


def _told(removal: Removal) -> dict[str, Any]:
    group = removal.group
    return {"layer": group.makers[0], "units": removal.kind, "before": len(group),
            "after": len(group) - removal.count, "makers": group.makers, "readers": group.readers}  # fmt: skip

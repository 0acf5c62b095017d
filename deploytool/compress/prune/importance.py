"""How much each unit matters, by weights, by activations, or by the loss; the smallest go first.

magnitude    sum of the squares of all of a unit's weights
activation   sum over the samples of ||W_c x_c||^2: the energy that the unit adds to the output of its readers
taylor       |dL/dg| for a gate g = 1 on all of the unit's channels, summed over the batches: the first-order change
             of the loss when the unit goes (Michel, Levy, Neubig, "Are sixteen heads really better than one?",
             NeurIPS 2019; Molchanov et al., "Importance estimation for neural network pruning", CVPR 2019)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import walk_blocks
from deploytool.compress.fitting import labelled_batches, outputs_of
from deploytool.compress.matrices import matrix
from deploytool.compress.prune.influence import channel_axis
from deploytool.compress.prune.readings import NOTHING, home, read
from deploytool.compress.prune.refit import ORDER_DAMPING, Reading, removal_order
from deploytool.compress.prune.tables import Structured
from deploytool.compress.prune.units import Group
from deploytool.compress.prune.weighing import Weighing
from deploytool.load.resize import sizes
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source
from deploytool.train.randomness import drawn

_BATCHES = 16  # of training data, for the gradient


def unit_scores(
    source: Source, groups: Sequence[Group], settings: Structured, samples: Sequence[dict[str, Tensor]]
) -> list[Tensor | None]:
    """float64 [units] per group; None where the order only follows from removing one after the other."""
    if settings.importance == "reconstruction":
        return [None] * len(groups)
    if settings.importance == "magnitude":
        return [_magnitude(source.module, group) for group in groups]
    if settings.importance == "taylor":
        return list(_taylor(source, groups))
    return [_activation(readings) for readings in all_readings(source, groups, samples)]


def losses(
    source: Source, groups: Sequence[Group], settings: Structured, samples: Sequence[dict[str, Tensor]],
    weighing: Mapping[str, Weighing] = NOTHING,
) -> list[list[float]]:  # fmt: skip
    """What removing one unit after the other costs each group, as a share of its whole: to compare groups."""
    if settings.importance == "reconstruction":
        readings = all_readings(source, groups, samples, weighing)
        return [removal_order(held, settings.damping or ORDER_DAMPING, len(group) - 1)[1]
                for held, group in zip(readings, groups, strict=True)]  # fmt: skip
    scores = unit_scores(source, groups, settings, samples)
    raw = [sorted(s.tolist()) for s in scores if s is not None]
    if settings.importance == "taylor":  # one loss for all of them: comparable as it is
        return raw
    return [[value / (sum(group) or 1.0) for value in group] for group in raw]


def all_readings(
    source: Source, groups: Sequence[Group], samples: Sequence[dict[str, Tensor]],
    weighing: Mapping[str, Weighing] = NOTHING,
) -> list[list[Reading]]:  # fmt: skip
    """What every group's readers see in the model as it is."""
    homes = [home(source.module, [*group.makers, *group.readers]) for group in groups]
    readers = [[n for n in group.readers if not _is_norm(source, n)] for group in groups]
    wanted = {name for names in readers for name in names}
    ordered = [name for name, _ in source.module.named_modules() if name in wanted]
    found: dict[tuple[int, str], Reading] = {}
    for block in walk_blocks(with_module(source, shell(source.module)), ordered, samples):
        for index, (group, names) in enumerate(zip(groups, readers, strict=True)):
            held = {n: columns(block.layers[n], n, group) for n in names if n in block.layers}
            made = read(block, block, held, whole=homes[index] is not None, weighing=weighing) if held else []
            found.update({(index, n): reading for n, reading in zip(held, made, strict=True)})
    return [[found[i, n] for n in names if (i, n) in found] for i, names in enumerate(readers)]


def columns(layer: nn.Module, name: str, group: Group) -> list[Tensor]:
    """For every unit the columns of the layer's matrix: a convolution has a kernel's worth for each input channel."""
    each = matrix(layer).shape[1] // sizes(layer)[0]
    return [(torch.tensor(unit.get(name, []), dtype=torch.int64)[:, None] * each + torch.arange(each)).flatten()
            for unit in group.inputs]  # fmt: skip


def _magnitude(module: nn.Module, group: Group) -> Tensor:
    scores = torch.zeros(len(group), dtype=torch.float64)
    for side, units in ((0, group.outputs), (1, group.inputs)):
        for name in dict.fromkeys(n for unit in units for n in unit):
            weight = module.get_submodule(name).get_parameter("weight").detach().double()
            squares = weight.square()
            axis = side if weight.ndim > 1 else 0  # a batch normalization has one weight for each channel
            total = squares.sum(dim=[d for d in range(weight.ndim) if d != axis]) if weight.ndim > 1 else squares
            scores += torch.stack([total[unit.get(name, [])].sum() for unit in units])
    return scores


def _activation(readings: list[Reading]) -> Tensor:
    return torch.stack([
        sum((((r.weight[:, c] @ r.gram[c][:, c]) * r.weight[:, c]).sum() for r, c in zip(readings, unit, strict=True)),
            torch.zeros((), dtype=torch.float64))
        for unit in zip(*(r.columns for r in readings), strict=True)
    ])  # fmt: skip


def _taylor(source: Source, groups: Sequence[Group]) -> Iterator[Tensor]:
    """Gates on the inputs of each group's first reader that is a matrix: every unit passes there."""
    batches, loss = labelled_batches(source, "structured")
    first = [next(n for n in group.readers if not _is_norm(source, n)) for group in groups]
    layers = [source.module.get_submodule(name) for name in first]
    gates = [torch.ones(sizes(layer)[0], requires_grad=True) for layer in layers]
    scores = [torch.zeros(len(group), dtype=torch.float64) for group in groups]
    handles = [
        layer.register_forward_pre_hook(partial(_gated, gate)) for layer, gate in zip(layers, gates, strict=True)
    ]
    try:
        for batch in islice(drawn(lambda: batches(0), "taylor"), _BATCHES):
            with torch.enable_grad():
                value = loss(outputs_of(source.flat, source, batch), batch)
                gradients = torch.autograd.grad(value, gates)
            for score, group, name, gradient in zip(scores, groups, first, gradients, strict=True):
                score += _summed(gradient, (unit[name] for unit in group.inputs)).abs()
    finally:
        for handle in handles:
            handle.remove()
    yield from scores


def _summed(gradient: Tensor, units: Iterable[list[int]]) -> Tensor:
    return torch.stack([gradient[channels].double().sum() for channels in units])


def _gated(gate: Tensor, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    shape = [1] * args[0].ndim
    shape[channel_axis(layer, args[0])] = -1
    return (args[0] * gate.view(shape), *args[1:])


def _is_norm(source: Source, name: str) -> bool:
    return isinstance(source.module.get_submodule(name), nn.modules.batchnorm._BatchNorm)

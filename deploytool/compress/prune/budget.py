"""How many units each group gives up."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from torch import nn

from deploytool.compress.prune.units import Group


def same_share(sizes: Sequence[int], share: float) -> list[int]:
    """round(share * n) of every group's n units; at least one unit stays."""
    return [min(round(share * size), size - 1) for size in sizes]


def least_loss(
    losses: Sequence[Sequence[float]], weights: Sequence[int], sizes: Sequence[int], share: float
) -> list[int]:
    """Units removed per group so that `share` of all removable weights goes where it costs least.

    `losses` are each group's costs of one unit after the other, `weights` the weights of one of its units, `sizes` its
    units. The unit with the least cost per weight goes next; at least one unit of every group stays.
    """
    budget = share * sum(w * size for w, size in zip(weights, sizes, strict=True))
    counts = [0] * len(sizes)
    waiting = [(costs[0] / w, g) for g, (costs, w, size) in enumerate(zip(losses, weights, sizes, strict=True))
               if size > 1 and costs]  # fmt: skip
    heapq.heapify(waiting)
    gone = 0.0
    while waiting:
        _, g = heapq.heappop(waiting)
        if gone + weights[g] > budget + 1e-9:
            continue
        gone += weights[g]
        counts[g] += 1
        if counts[g] < min(sizes[g] - 1, len(losses[g])):
            heapq.heappush(waiting, (losses[g][counts[g]] / weights[g], g))
    return counts


def unit_weights(module: nn.Module, group: Group) -> int:
    """Weights that go with one unit: its rows of the layers that make it and its columns of those that read it."""
    total = 0
    for axis, unit in ((0, group.outputs[0]), (1, group.inputs[0])):
        for name, channels in unit.items():
            weight = module.get_submodule(name).get_parameter("weight")
            if weight.ndim > axis:
                total += weight.numel() // weight.shape[axis] * len(channels)
    return total

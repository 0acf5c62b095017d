"""How many directions each layer may keep: by energy, by a share of its weights, or out of one budget for all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_HALVINGS = 200


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest rank whose singular values s [k] (descending) hold `energy` of the sum of their squares."""
    share = s.double().square().cumsum(0)
    return min(int((share < energy * share[-1]).sum()) + 1, len(s))


def rank_for_keep(rows: int, columns: int, keep: float) -> int:
    """The largest rank r with r (rows + columns) <= keep rows columns; at least 1."""
    return max(1, int(keep * rows * columns / (rows + columns)))


def largest_saving_rank(rows: int, columns: int) -> int:
    """The largest rank whose pair has fewer weights than the matrix; 0 when none has."""
    return (rows * columns - 1) // (rows + columns)


def tail_energy(s: Tensor) -> Tensor:
    """What a truncation loses: [k + 1], entry r is the sum of squares of s [k] from index r on, so the last is 0."""
    tail = s.double().square().flip(0).cumsum(0).flip(0)
    return torch.cat([tail, tail.new_zeros(1)])


def spread(losses: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int) -> list[int | None]:
    """Ranks that together cost at most `budget` weights and lose little; None where a layer stays as it is.

    losses[i] [k + 1] is what layer i loses at rank 0 .. k; shapes[i] its rows and columns. For a price per weight every
    layer has its own best rank, or stays dense at a loss of 0; the price is found by bisection (Everett, "Generalized
    Lagrange multiplier method", Operations Research 1963), and what it leaves over is given out singly, to whom it
    helps most per weight. A budget below one direction for each layer gives all of them rank 1.
    """
    low, high = 0.0, max(float(loss[0]) for loss in losses) + 1.0
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        if _cost(_at_price(losses, shapes, price), shapes) > budget:
            low = price
        else:
            high = price
    return _fill(_at_price(losses, shapes, high), losses, shapes, budget)


def _at_price(losses: Sequence[Tensor], shapes: Sequence[tuple[int, int]], price: float) -> list[int | None]:
    ranks: list[int | None] = []
    for loss, (rows, columns) in zip(losses, shapes, strict=True):
        most = min(largest_saving_rank(rows, columns), len(loss) - 1)
        if most < 1:
            ranks.append(None)
            continue
        total = loss[1 : most + 1] + price * (rows + columns) * torch.arange(1, most + 1, dtype=loss.dtype)
        best = int(total.argmin())
        ranks.append(None if price * rows * columns <= float(total[best]) else best + 1)
    return ranks


def _fill(
    ranks: list[int | None], losses: Sequence[Tensor], shapes: Sequence[tuple[int, int]], budget: int
) -> list[int | None]:
    left = budget - _cost(ranks, shapes)
    while True:
        gains = []
        for index, (rank, loss, (rows, columns)) in enumerate(zip(ranks, losses, shapes, strict=True)):
            cost = rows + columns
            if rank is not None and rank < largest_saving_rank(rows, columns) and cost <= left:
                gains.append((float(loss[rank] - loss[rank + 1]) / cost, -index))
        if not gains:
            return ranks
        index = -max(gains)[1]
        ranks[index] = (ranks[index] or 0) + 1
        left -= sum(shapes[index])


def _cost(ranks: Sequence[int | None], shapes: Sequence[tuple[int, int]]) -> int:
    return sum(r * c if rank is None else rank * (r + c) for rank, (r, c) in zip(ranks, shapes, strict=True))

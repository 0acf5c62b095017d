"""Closed forms behind structured removal: which columns of a matrix matter least, and the best of what remains.

    W' = (D[:, K] + l W[:, K]) (G[K, K] + l I)^-1    minimizes ||Y^T - W' X[:, K]^T||^2 + l ||W' - W[:, K]||^2

with G = X^T X of the inputs now, D = Y^T X with the outputs Y that are wanted, and l a share of G's mean diagonal.
Columns c are removed at the loss  tr(W_c (H_cc)^-1 W_c^T)  with H = (G + l I)^-1, after which W and H are those of the
regression without them. Where errors of the outputs do not count alike (weighing.py), R^T W stands for W: the fit is
the same, as each output is a regression of its own, but not which columns matter least.

Sources: Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", NIPS 1992; for whole
structures Kurtic, Frantar, Alistarh, "ZipLM: inference-aware structured pruning of language models", NeurIPS 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from deploytool.compress.prune.repair import fit_kept
from deploytool.errors import BackendFailed

DAMPINGS = (0.001, 0.01, 0.1, 1.0, 10.0)
ORDER_DAMPING = 0.03  # for choosing what goes, where no damping is asked for
_ROUNDS = 64  # scores are taken anew so often on the way from all units to none


@dataclass
class Reading:
    """A layer that reads the units.

    weight         [out, in], of the uncompressed model
    gram, wanted   G [in, in] and D [out, in], float64, over all rows
    columns        those of each unit
    held           G and D of the rows that are held out for choosing the damping; None when there are too few
    spread         sum of squares that losses are shares of; None: the energy of the layer's own outputs
    root           R [out, out]: an error e of the outputs counts as |e R|^2; None: as |e|^2
    """

    weight: Tensor
    gram: Tensor
    wanted: Tensor
    columns: list[Tensor]
    held: tuple[Tensor, Tensor] | None = None
    spread: float | None = None
    root: Tensor | None = None


def best_weight(weight: Tensor, gram: Tensor, wanted: Tensor, kept: Tensor, damping: float) -> Tensor:
    """The weight [out, kept] that serves best on the kept columns, float64; see the formula above."""
    ridge = damping * float(gram.diagonal().mean()) or 1.0
    right = wanted[:, kept] + ridge * weight[:, kept].double()
    best: Tensor = torch.cholesky_solve(right.T, _lower(gram[kept][:, kept], ridge)).T
    return best


def best_kept(start: Tensor, reading: Reading, keep: Tensor, damping: float) -> Tensor:
    """The same where only the entries in `keep` [out, in] may differ from zero, from `start` [out, in] on; float32."""
    ridge = damping * float(reading.gram.diagonal().mean()) or 1.0
    damped = reading.gram.clone()
    damped.diagonal().add_(ridge)
    return fit_kept(start * keep, keep, damped, reading.wanted + ridge * reading.weight.double())[0]


def best_damping(reading: Reading, kept: Tensor) -> float:
    """The one of DAMPINGS whose fit to the other rows loses least on the rows held out; the middle one without any."""
    if reading.held is None:
        return DAMPINGS[len(DAMPINGS) // 2]
    gram, wanted = reading.held
    losses = []
    for damping in DAMPINGS:
        fitted = best_weight(reading.weight, reading.gram - gram, reading.wanted - wanted, kept, damping)
        losses.append(float(((fitted @ gram[kept][:, kept] - 2 * wanted[:, kept]) * fitted).sum()))
    return DAMPINGS[losses.index(min(losses))]


def removal_order(readings: Sequence[Reading], damping: float, most: int) -> tuple[list[int], list[float]]:
    """The first `most` units to remove, least loss first, and the loss when each goes, as a share of the reading's
    spread.

    Each removal counts on the remaining columns making good for it; losses of several readers are added.
    """
    states = [_start(reading, damping) for reading in readings]
    left = list(range(len(readings[0].columns)))
    step = max(1, len(left) // _ROUNDS)
    order: list[int] = []
    losses: list[float] = []
    while len(order) < most:
        scores = torch.stack([_scores(w, h, [r.columns[u] for u in left]) / energy
                              for (w, h, energy), r in zip(states, readings, strict=True)]).sum(dim=0)  # fmt: skip
        gone = scores.argsort(stable=True)[: min(step, most - len(order))].tolist()
        for (w, h, _), reading in zip(states, readings, strict=True):
            _remove(w, h, torch.cat([reading.columns[left[i]] for i in gone]))
        order += [left[i] for i in gone]
        losses += [float(scores[i]) for i in gone]
        left = [unit for i, unit in enumerate(left) if i not in set(gone)]
    return order, losses


def _start(reading: Reading, damping: float) -> tuple[Tensor, Tensor, float]:
    """W and H of all columns, float32, and what losses are shares of."""
    everything = torch.arange(reading.gram.shape[0])
    weight = best_weight(reading.weight, reading.gram, reading.wanted, everything, damping)
    ridge = damping * float(reading.gram.diagonal().mean()) or 1.0
    inverse = torch.cholesky_inverse(_lower(reading.gram, ridge))
    weight = weight if reading.root is None else reading.root.T @ weight
    energy = float(((weight @ reading.gram) * weight).sum()) if reading.spread is None else reading.spread
    return weight.float(), inverse.float(), energy or 1.0


def _scores(weight: Tensor, inverse: Tensor, units: list[Tensor]) -> Tensor:
    """tr(W_c (H_cc)^-1 W_c^T) of every unit."""
    if all(len(columns) == 1 for columns in units):
        picked = torch.cat(units)
        return weight[:, picked].square().sum(dim=0) / inverse.diagonal()[picked]
    return torch.stack([_loss(weight[:, c], inverse[c][:, c]) for c in units])


def _loss(part: Tensor, block: Tensor) -> Tensor:
    lost: Tensor = (torch.linalg.solve(block.double(), part.T.double()) * part.T).sum().float()
    return lost


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Take columns out of the regression, in place."""
    shares = torch.linalg.solve(inverse[columns][:, columns], inverse[columns])
    weight -= weight[:, columns] @ shares
    inverse -= inverse[:, columns] @ shares
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0


def _lower(gram: Tensor, ridge: float) -> Tensor:
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    lower: Tensor
    lower, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed):
        raise BackendFailed("DT504", "the inputs' second moments must be positive definite (they are not)",
                            fix="raise damping, or calibrate with other samples")  # fmt: skip
    return lower

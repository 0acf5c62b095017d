"""Activation-aware factorization: least change of outputs on the calibration samples, and one budget for all layers."""

from __future__ import annotations

import dataclasses
from itertools import product

import pytest
import torch
from torch import Tensor

from deploytool.compress.factorize.ranks import largest_saving_rank, spread, tail_energy
from deploytool.compress.factorize.svd import apply
from deploytool.compress.factorize.tables import Svd
from deploytool.compress.factorize.whitening import best_weight, whitened_svd, whitener
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import Source

TINY_DAMPING = 1e-9


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inputs(rows: int = 200, width: int = 8) -> Tensor:
    """Rows whose directions differ in strength by a factor of 100, turned so that no axis is one of them."""
    turn, _ = torch.linalg.qr(_random(width, width, seed=1))
    return _random(rows, width, seed=2) * torch.logspace(0, -2, width) @ turn


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_error_is_the_least_of_that_rank(rank: int) -> None:
    """The outputs' error must be the discarded singular values' squares, and least: that of the outputs' own SVD."""
    weight, x = _random(12, 8), _inputs()
    u, s, vh = whitened_svd(weight, whitener(x.T @ x, TINY_DAMPING))
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    error = (x @ (weight - low).T).square().sum()
    least = torch.linalg.svdvals(x @ weight.T)[rank:].square().sum()
    torch.testing.assert_close(error, least, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(error, s[rank:].square().sum(), rtol=1e-4, atol=1e-6)
    plain = torch.linalg.svd(weight, full_matrices=False)
    nearest = (plain[0][:, :rank] * plain[1][:rank]) @ plain[2][:rank]
    assert error < 0.9 * (x @ (weight - nearest).T).square().sum()


def test_best_weight_is_the_least_squares_solution() -> None:
    """With inputs x' for x, M must be what torch's least squares finds; with x' = x it must be W."""
    weight, x = _random(5, 8), _random(300, 8, seed=3)
    now = x + 0.3 * _random(300, 8, seed=4)
    found = best_weight(weight, x.T @ now, now.T @ now, TINY_DAMPING)
    torch.testing.assert_close(found, torch.linalg.lstsq(now, x @ weight.T).solution.T, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(best_weight(weight, x.T @ x, x.T @ x, 0.1), weight)


def test_a_singular_gram_is_damped_and_an_empty_one_refused() -> None:
    """Inputs of rank 1 must be whitened after damping; zeros and NaN must be an error, not a result."""
    x = _random(1, 6)
    s = whitener(x.T @ x, 1e-3)
    torch.testing.assert_close(s @ s.T, x.T @ x + 1e-3 * x.square().mean() * torch.eye(6, dtype=torch.float64))
    for gram in (torch.zeros(4, 4), torch.full((4, 4), torch.nan)):
        with pytest.raises(ValueError, match="finite and not all zero"):
            whitener(gram, 1e-3)


def test_spread_is_near_the_best_of_all() -> None:
    """Two small layers: the loss must be within a rank's step of the best of all pairs of ranks that fit."""
    shapes = [(10, 10), (8, 12)]
    losses = [tail_energy(torch.tensor([9.0, 3, 1, 0.5, 0.2, 0.1, 0.1, 0.1, 0.1, 0.1])),
              tail_energy(torch.tensor([5.0, 4, 3, 2, 1.5, 1, 0.5, 0.2]))]  # fmt: skip
    for budget in range(60, 190, 7):
        ranks = spread(losses, shapes, budget)
        costs = [n * m if r is None else r * (n + m) for r, (n, m) in zip(ranks, shapes, strict=True)]
        assert sum(costs) <= budget
        loss = sum(0.0 if r is None else float(x[r]) for r, x in zip(ranks, losses, strict=True))
        options = [[*((r * 20, float(x[r])) for r in range(1, largest_saving_rank(n, m) + 1)), (n * m, 0.0)]
                   for x, (n, m) in zip(losses, shapes, strict=True)]  # fmt: skip
        best = min(a[1] + b[1] for a, b in product(*options) if a[0] + b[0] <= budget)
        smaller = min((a[1] + b[1] for a, b in product(*options) if a[0] + b[0] <= budget - 40), default=float("inf"))
        assert best - 1e-9 <= loss <= smaller + 1e-9


def _damage(source: Source, changed: Source) -> float:
    """Squared change of the output "hidden" over the samples."""
    pairs = [(source.module(**s)["hidden"], changed.module(**s)["hidden"]) for s in source.samples()]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_step_keeps_outputs_better_than_plain(tiny: Source, context: Context) -> None:
    """At the same size the whitened step must change outputs less than the plain one; runs must be bit-identical."""
    plain, _ = apply(tiny, Svd(step="svd", rank=2), context)
    made = [apply(tiny, Svd(step="svd", rank=2, whiten=True), context) for _ in range(2)]
    assert _damage(tiny, made[0][0]) < 0.7 * _damage(tiny, plain)
    assert made[0][0].edits == plain.edits and made[0][1] == made[1][1] and made[0][1]["samples"] == 3
    for a, b in zip(*(m.module.state_dict().values() for m, _ in made), strict=True):
        assert torch.equal(a, b)


def test_reconstruction_makes_good_what_came_before(tiny: Source, context: Context) -> None:
    """Fitting to the original's outputs must change the model's outputs less than whitening alone."""
    settings = {"rank": 2, "whiten": True, "damping": 1e-4}
    alone, _ = apply(tiny, Svd(step="svd", **settings), context)
    fitted, _ = apply(tiny, Svd(step="svd", reconstruct=True, **settings), context)
    assert _damage(tiny, fitted) < _damage(tiny, alone)


def test_a_budget_is_kept_and_goes_where_it_helps() -> None:
    """All layers together must be within the share, and outputs must change less than with one share for each."""
    digits = open_source(resolve("digits"))
    context = Context(digits, Calibration(samples=8), 0, lambda line: None)
    chosen = {"include": ("blocks.*",), "whiten": True}
    one, same = apply(digits, Svd(step="svd", keep=0.5, **chosen), context)
    spent, report = apply(digits, Svd(step="svd", budget=0.5, **chosen), context)
    linears = 4 * (4 * 64 * 64 + 2 * 64 * 256)
    left = linears - sum(row["parameters_before"] - row["parameters_after"] for row in report["layers"])
    assert 0.48 * linears < left <= 0.5 * linears
    assert len({row["rank"] for row in report["layers"]}) > len({row["rank"] for row in same["layers"]})
    changes = []
    for changed in (one, spent):
        pairs = [(digits.module(**s)["logits"], changed.module(**s)["logits"]) for s in digits.samples()]
        changes.append(sum(float((a - b).square().sum()) for a, b in pairs))
    assert changes[1] < changes[0]


def test_wrong_input_is_named(tiny: Source, context: Context) -> None:
    """A rank that no matrix has, no samples, samples with NaN and idle patterns must each be refused with a reason."""
    with pytest.raises(UsageProblem, match="no layer has more than 12"):
        apply(tiny, Svd(step="svd", rank=13), context)
    with pytest.raises(UsageProblem, match="must match layers"):
        apply(tiny, Svd(step="svd", rank=2, include=("attention.*",)), context)
    whitened = Svd(step="svd", rank=2, whiten=True)
    with pytest.raises(InputRefused, match="at least one sample"):
        apply(dataclasses.replace(tiny, samples=lambda: iter(())), whitened, context)
    digits = open_source(resolve("digits"))
    broken = dataclasses.replace(digits, samples=lambda: iter([{"image": torch.full((2, 1, 8, 8), torch.nan)}]))
    with pytest.raises(InputRefused, match="NaN"):
        apply(broken, whitened, context)


@pytest.mark.parametrize("settings", [{}, {"rank": 2, "budget": 0.5}, {"rank": 2, "reconstruct": True}])
def test_settings_that_contradict_are_refused(settings: dict[str, object]) -> None:
    """No size, two sizes, and a reconstruction without inputs to look at must be refused by the table."""
    with pytest.raises(ValueError, match=r"exactly one of|needs whiten"):
        Svd(step="svd", **settings)

"""The tensor kernels of pruning: exact counts, the right weights, and the least loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deploytool.compress.matrices import gram
from deploytool.compress.prune import wanda
from deploytool.compress.prune.magnitude import keep_mask
from deploytool.compress.prune.pattern import check_widths, keep_in_rows, keep_of_groups
from deploytool.compress.prune.repair import fit_kept
from deploytool.compress.prune.sparsegpt import relative_error, sparsify
from deploytool.compress.quantize.gptq import inverse_root, ridge_of, root_of
from deploytool.compress.quantize.layers import output_error
from deploytool.compress.quantize.ranges import choose
from deploytool.errors import BackendFailed, UsageProblem
from deploytool.load.grid import lies_on, snap


def _layer(rows: int = 24, columns: int = 48, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and the moments X^T X of correlated inputs of very different strengths."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) * torch.linspace(0.05, 2, columns)
    x = torch.randn(400, columns, generator=generator) @ mix
    return torch.randn(rows, columns, generator=generator), gram(x.double())


@pytest.mark.parametrize(("kept", "group"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_groups_keep_the_highest(kept: int, group: int) -> None:
    """Of every M neighbours in a row exactly N must stay: those with the highest scores."""
    score = torch.rand(5, 24, generator=torch.Generator().manual_seed(1))
    keep = keep_of_groups(score, kept, group)
    for row in range(5):
        for start in range(0, 24, group):
            part = score[row, start : start + group].numpy()
            assert set(np.flatnonzero(keep[row, start : start + group])) == set(np.argsort(part)[group - kept :])


def test_equal_scores_go_in_order() -> None:
    """Of equal scores the first must go, so that a mask never depends on the machine."""
    assert keep_of_groups(torch.ones(1, 4), 2, 4).tolist() == [[False, False, True, True]]
    assert keep_in_rows(torch.zeros(2, 3), 1).tolist() == [[False, True, True]] * 2


def test_a_pattern_must_divide_the_width() -> None:
    """Layers whose rows the pattern does not divide must be named in the error."""
    with pytest.raises(UsageProblem, match="must divide the row length") as caught:
        check_widths({"good": 8, "bad": 9}, (2, 4))
    assert caught.value.detail == ("bad: rows of 9 weights",)
    check_widths({"any": 9}, None)


def test_wanda_is_the_formula() -> None:
    """Every row must lose the weights with the smallest |W| ||X||, the same number in every row."""
    weight, moments = _layer()
    keep = wanda.keep_mask(weight, moments.diagonal(), 0.4, None)
    score = weight.abs().double().numpy() * np.sqrt(moments.diagonal().numpy())
    for row in range(len(weight)):
        assert set(np.flatnonzero(~keep[row].numpy())) == set(np.argsort(score[row])[: round(0.4 * 48)])


def _lost(weight: Tensor, new: Tensor, moments: Tensor) -> float:
    """||(W - W') X||^2 / ||W X||^2."""
    return output_error(weight, new, moments) ** 2


@pytest.mark.parametrize(("fine", "near"), [(True, 1e-9), (False, 1e-3)])
def test_root_is_the_inverses_factor(fine: bool, near: float) -> None:
    """U must be upper triangular with U^T U the inverse of the damped moments, to float64's or float32's accuracy."""
    _, moments = _layer()
    root, damping = root_of(moments, 0.01, fine=fine)
    assert damping == 0.01 and torch.equal(root, root.triu())
    assert root.dtype == (torch.float64 if fine else torch.float32)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    root = root.double()
    torch.testing.assert_close(root.T @ root @ damped, torch.eye(48, dtype=torch.float64), rtol=0, atol=near)


def test_root_takes_float64_where_float32_is_not_enough() -> None:
    """Moments that only float32 finds indefinite must not be damped more."""
    x = torch.ones(100, 40, dtype=torch.float64) + 1e-4 * torch.randn(100, 40, dtype=torch.float64)
    moments = x.T @ x
    with pytest.raises(AssertionError):
        assert inverse_root(moments.float(), 1e-9)[1] == 1e-9
    root, damping = root_of(moments, 1e-9)
    assert damping == 1e-9 and bool(torch.isfinite(root).all())


def test_ridge_is_what_the_root_adds() -> None:
    """G + L must be the inverse of U^T U, for inputs that are always zero and for such that are not."""
    _, moments = _layer()
    moments[5], moments[:, 5] = 0.0, 0.0
    root, damping = root_of(moments, 0.02, fine=True)
    whole = moments + ridge_of(moments, damping).diag()
    torch.testing.assert_close(root.T @ root @ whole, torch.eye(48, dtype=torch.float64), rtol=0, atol=1e-9)


def test_damping_grows_until_it_serves() -> None:
    """Moments that are not positive definite must be damped more, and told; hopeless ones must be an error."""
    _, moments = _layer()
    shifted = moments - 0.05 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    root, damping = root_of(shifted, 0.001)
    assert damping == pytest.approx(0.1) and bool(torch.isfinite(root).all())
    with pytest.raises(BackendFailed, match="positive definite"):
        root_of(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)


def _exact(weight: Tensor, moments: Tensor, keep: Tensor) -> Tensor:
    """Column by column with inverses of the remaining moments, as the paper defines it; slow."""
    w = weight.double().clone()
    for j in range(w.shape[1]):
        inverse = torch.linalg.inv(moments[j:, j:])
        pruned = ~keep[:, j]
        step = w[pruned, j] / inverse[0, 0]
        w[pruned, j:] -= step[:, None] * inverse[0]
        w[pruned, j] = 0
    return w


@pytest.mark.parametrize("block", [1, 7, 16, 48, 100])
def test_sweep_is_the_papers_definition(block: int) -> None:
    """For the mask that was chosen, the weights must be those of the definition, however columns are blocked."""
    weight, moments = _layer()
    root, damping = root_of(moments, 0.01)
    new, keep = sparsify(weight, root, 0.5, block=block)
    damped = moments + damping * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    torch.testing.assert_close(new, _exact(weight, damped, keep).float(), rtol=1e-3, atol=1e-4)
    assert torch.equal(new != 0, keep)
    for start in range(0, 48, block):
        part = keep[:, start : start + block]
        assert int((~part).sum()) == round(0.5 * part.numel())


@pytest.mark.parametrize(("kept", "group", "block"), [(2, 4, 16), (4, 8, 20), (1, 4, 3)])
def test_sweep_keeps_the_pattern(kept: int, group: int, block: int) -> None:
    """Every M neighbours must keep exactly N, also where the block is no multiple of M."""
    weight, moments = _layer()
    new, keep = sparsify(weight, root_of(moments, 0.01)[0], 0.0, (kept, group), block=block)
    assert bool((keep.view(24, -1, group).sum(-1) == kept).all()) and not new[~keep].any()


def test_each_method_loses_less_than_the_simpler_one() -> None:
    """On correlated inputs SparseGPT must lose less of the outputs than Wanda, and that less than magnitude."""
    weight, moments = _layer(rows=64)
    masks = [keep_mask(weight, weight.numel() // 2), wanda.keep_mask(weight, moments.diagonal(), 0.5, None)]
    simple = [_lost(weight, weight * mask, moments) for mask in masks]
    new, _ = sparsify(weight, root_of(moments, 0.01)[0], 0.5, block=48)
    assert _lost(weight, new, moments) < 0.8 * simple[1] < 0.8 * simple[0]


def test_earlier_zeros_stay_first() -> None:
    """Weights that were pruned before must be pruned again, and count among those asked for."""
    weight, moments = _layer()
    before = torch.rand(24, 48, generator=torch.Generator().manual_seed(3)) > 0.3
    _, keep = sparsify(weight * before, root_of(moments, 0.01)[0], 0.5, block=48, before=before)
    assert not (keep & ~before).any() and int(keep.sum()) == 24 * 24


@pytest.mark.parametrize("kept_of", [None, (2, 4)])
def test_more_earlier_zeros_than_asked_for_stay(kept_of: tuple[int, int] | None) -> None:
    """Zeros of earlier steps must stay where fewer are asked for, and what is kept make good for them."""
    weight, moments = _layer()
    before = torch.rand(24, 48, generator=torch.Generator().manual_seed(3)) > 0.7
    root, _ = root_of(moments, 0.01)
    new, keep = sparsify(weight, root, 0.5, kept_of, block=48, before=before)
    assert not (keep & ~before).any() and not new[~before].any()
    assert _lost(weight, new, moments) < _lost(weight, weight * keep, moments)


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    """A dead input must leave all other weights finite and take part in the mask."""
    weight, moments = _layer()
    moments[5] = moments[:, 5] = 0
    new, _ = sparsify(weight, root_of(moments, 0.01)[0], 0.5, block=16)
    assert bool(torch.isfinite(new).all())
    new, _ = sparsify(weight, root_of(torch.zeros(48, 48), 0.01)[0], 0.5, block=16)
    assert bool(torch.isfinite(new).all())


def test_joint_rounding_makes_good_for_itself() -> None:
    """What is kept must lie on the grid, zeros included, and lose less than pruning first and rounding afterwards."""
    weight, moments = _layer(rows=64)
    grid = choose(weight, 3, 16, symmetric=False)
    root = root_of(moments, 0.01)[0]
    joint, keep = sparsify(weight, root, 0.25, block=16, grid=grid)
    assert lies_on(joint, grid) and not joint[~keep].any() and int((~keep).sum()) == weight.numel() // 4
    after = snap(sparsify(weight, root, 0.25, block=16)[0], grid)
    assert _lost(weight, joint, moments) < 0.9 * _lost(weight, after, moments)


def test_fit_of_what_is_kept_is_least_squares() -> None:
    """Every row must get what a regression on its kept columns gives."""
    weight, moments = _layer()
    keep = torch.rand(24, 48, generator=torch.Generator().manual_seed(2)) > 0.5
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    wanted = weight.double() @ damped
    fitted, left = fit_kept(weight * keep, keep, damped, wanted, iterations=200)
    assert not fitted[~keep].any()
    for row in range(0, 24, 5):
        kept = keep[row]
        exact = torch.linalg.solve(damped[kept][:, kept], wanted[row, kept])
        torch.testing.assert_close(fitted[row, kept].double(), exact, rtol=1e-2, atol=1e-3)
    near = 1e-5 * float(wanted.abs().max())
    torch.testing.assert_close(left.double(), wanted - fitted.double() @ damped, rtol=0, atol=near)
    rough, _ = fit_kept(weight * keep, keep, damped, wanted, iterations=5)
    errors = [_lost(weight, w, damped) for w in (weight * keep, rough, fitted)]
    assert errors[0] > errors[1] > errors[2]


def test_error_is_that_of_the_outputs() -> None:
    """The report's error must be ||(W - W') X||^2 / ||W X||^2, made from what the fit has left."""
    weight, moments = _layer()
    ridge = ridge_of(moments, 0.01)
    whole = moments + ridge.diag()
    new, left = fit_kept(weight * (weight > 0), weight > 0, whole, weight.double() @ whole, iterations=6)
    error = relative_error(weight, new, weight.double() @ whole, left, ridge)
    assert error == pytest.approx(_lost(weight, new, moments), rel=1e-3)

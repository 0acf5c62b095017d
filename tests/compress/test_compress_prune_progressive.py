"""Pruning in rounds: the schedule, zeros that stay, and less lost than at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deploytool.compress.prune import magnitude
from deploytool.compress.prune.progressive import apply, shares
from deploytool.compress.prune.tables import Magnitude, Progressive
from deploytool.compress.recipe import load_recipe
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.source import Source


def test_shares_follow_the_formula() -> None:
    """Both growths must end at the asked share; the cubic one must take most at first."""
    assert shares(0.0, 0.8, 4, "linear") == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert shares(0.0, 0.8, 4, "cubic") == pytest.approx([0.8 * (1 - 0.75**3), 0.7, 0.8 * (1 - 0.25**3), 0.8])
    assert shares(0.5, 0.9, 2, "linear") == pytest.approx([0.7, 0.9])


@pytest.mark.parametrize("train", ["distill", "finetune"])
def test_zeros_stay_and_training_wins_back(tiny: Source, context: Context, train: str) -> None:
    """Every round's report must hold its share, the last masks be exactly zero, and the loss below that of pruning."""
    settings = Progressive(step="progressive", sparsity=0.7, rounds=3, epochs=8, learning_rate=0.01, train=train)
    done, report = apply(tiny, settings, context)
    assert [r["sparsity"] for r in report["rounds"]] == pytest.approx(shares(0, 0.7, 3, "cubic"))
    for name in ("up.weight", "down.weight"):
        weight = done.module.get_parameter(name)
        assert torch.equal(weight != 0, done.masks[name])
        assert int((weight == 0).sum()) == round(0.7 * weight.numel())
    once, _ = magnitude.apply(tiny, Magnitude(step="magnitude", sparsity=0.7), context)
    assert tiny.train_batches is not None and tiny.loss is not None
    lost = [sum(tiny.loss(s.module(b["ids"]), b).item() for b in tiny.train_batches()) for s in (done, once)]
    assert lost[0] < 0.9 * lost[1]


def test_two_runs_are_bit_identical(tiny: Source, context: Context) -> None:
    """The same seed must give the same weights."""
    settings = Progressive(step="progressive", sparsity=0.5, rounds=2, method="sparsegpt")
    one, two = (apply(tiny, settings, context)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_share_that_does_not_grow_is_refused(tmp_path: Path) -> None:
    """A start at or above the end must be an error of the recipe."""
    path = tmp_path / "r.toml"
    path.write_text('[[compress]]\nstep = "progressive"\nsparsity = 0.5\nstart = 0.5\n')
    with pytest.raises(UsageProblem) as caught:
        load_recipe(path)
    assert "start must be below sparsity" in caught.value.detail[0]

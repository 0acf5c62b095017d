"""The training loop: deterministic, masked, clipped, and loud when it diverges."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import BackendFailed, CheckFailed, InputRefused
from deploytool.train.loop import fit
from deploytool.train.schedule import Schedule, learning_rate
from deploytool.train.stream import Batch


def _model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).eval().requires_grad_(False)


def _batches(epoch: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(3):
        x = torch.randn(16, 4, generator=generator)
        yield {"x": x, "y": x.sum(1, keepdim=True)}


def _train(model: nn.Module, schedule: Schedule, masks: dict[str, Tensor] | None = None) -> list[float]:
    return fit(model, _batches, lambda b: (model(b["x"]) - b["y"]).square().mean(), schedule, masks=masks).losses


def test_same_seed_same_weights() -> None:
    """Two runs with one seed must give equal bits in spite of dropout; another seed must not."""
    states = []
    for seed in (1, 1, 2):
        model = _model()
        torch.manual_seed(99 + len(states))  # the caller's random state must not matter
        _train(model, Schedule(2, 0.01, seed=seed))
        states.append(torch.cat([p.flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


def test_callers_state_comes_back() -> None:
    """Mode, gradients, random state and the determinism setting must be as before."""
    model = _model()
    before = torch.get_rng_state()
    _train(model, Schedule(1, 0.01))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), before) and not torch.are_deterministic_algorithms_enabled()


def test_masked_weights_stay_zero() -> None:
    """A masked weight must be zero after training, the others must move."""
    model = _model()
    mask = torch.arange(32).view(8, 4) % 3 != 0
    start = model[0].weight.clone()
    _train(model, Schedule(3, 0.05), {"0.weight": mask})
    assert torch.equal(model[0].weight != 0, mask) and (model[0].weight[mask] != start[mask]).all()


def test_it_learns() -> None:
    """The loss on a learnable task must fall to less than a third."""
    losses = _train(_model(), Schedule(60, 0.02))
    assert len(losses) == 180 and sum(losses[-6:]) < sum(losses[:6]) / 3


def test_steps_end_training_in_the_middle_of_an_epoch() -> None:
    """`steps` must be the exact number of steps when the epochs hold more."""
    assert len(_train(_model(), Schedule(5, 0.01, steps=4))) == 4


def test_schedules() -> None:
    """The cosine must start at the full rate, be half in the middle and nearly zero at the end."""
    cosine, constant = Schedule(1, 0.1), Schedule(1, 0.1, shape="constant")
    assert learning_rate(cosine, 0, 100) == 0.1
    assert learning_rate(cosine, 50, 100) == pytest.approx(0.05)
    assert learning_rate(cosine, 99, 100) == pytest.approx(0.05 * (1 + math.cos(math.pi * 0.99)))
    assert {learning_rate(constant, i, 100) for i in range(100)} == {0.1}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_divergence_is_an_error(bad: float) -> None:
    """A loss that is not finite must end training with a clear error, not with NaN weights."""
    model = _model()
    with pytest.raises(CheckFailed, match="must be finite") as caught:
        fit(model, _batches, lambda b: model(b["x"]).mean() * bad, Schedule(1, 0.01))
    assert caught.value.code == "DT105"
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    """sqrt at 0 has a finite value and an infinite gradient: that must be an error too."""
    model = _model()
    with pytest.raises(CheckFailed, match="gradient"):
        fit(model, _batches, lambda b: (model(b["x"]) * 0).sqrt().sum(), Schedule(1, 0.01))


def test_no_batches_is_an_error() -> None:
    """Training on nothing must be refused, also when the batches run out after the first pass."""
    model = _model()
    with pytest.raises(InputRefused, match="at least one batch"):
        fit(model, lambda epoch: [], lambda b: model(b["x"]).mean(), Schedule(1, 0.01))
    once = iter(list(_batches(0)))
    with pytest.raises(InputRefused, match="every epoch"):
        fit(model, lambda epoch: once, lambda b: model(b["x"]).mean(), Schedule(1, 0.01))


def test_torchs_errors_are_translated() -> None:
    """A shape that does not fit must be a BackendFailed that quotes torch."""
    model = _model()
    with pytest.raises(BackendFailed, match="mat1 and mat2"):
        fit(model, _batches, lambda b: model(b["y"]).mean(), Schedule(1, 0.01))

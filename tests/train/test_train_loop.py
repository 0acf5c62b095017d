"""The training loop: deterministic, masked, clipped, and loud when it diverges."""

from __future__ import annotations

import gc
import math
import re
from collections.abc import Iterator

import psutil
import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import BackendFailed, CheckFailed, InputRefused, UsageProblem
from deploytool.train.loop import fit
from deploytool.train.schedule import Precision, Schedule, learning_rate
from deploytool.train.stream import IGNORED, Batch, Batches


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


def test_masked_weights_are_plain_zeros() -> None:
    """A masked weight must be zero in all bits: minus zero is stored as a value of its own."""
    model = _model()
    mask = torch.rand(8, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    _train(model, Schedule(2, 0.01), {"0.weight": mask})
    assert not model[0].weight[~mask].signbit().any()


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


def _regression(model: nn.Module, size: int, rows: int = 64) -> Batches:
    """The same 64 rows in batches of `size`, each row with a number of targets that count."""
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(3))
    target = torch.where(torch.arange(rows * 5).view(rows, 5) % 7 < torch.arange(rows)[:, None] % 6, 1, IGNORED)
    return lambda epoch: [{"x": a, "target": b} for a, b in zip(x.split(size), target.split(size), strict=True)]


def _masked_mean(model: nn.Module, batch: Batch) -> Tensor:
    """Mean over the targets that count, as a language model's loss is a mean over tokens."""
    counts = batch["target"] != IGNORED
    return ((model(batch["x"]) - 1).square() * counts).sum() / counts.sum()


@pytest.mark.parametrize("rows", [64, 56])
def test_accumulated_batches_equal_one_large_batch(rows: int) -> None:
    """Four batches of 8 must train as one of 32 does, to 1e-5, also where each holds another number of targets."""
    weights = []
    for size, accumulate in ((32, 1), (8, 4)):
        model = _model().eval()
        model[1].p = 0.0
        batches = _regression(model, size, rows)
        trained = fit(model, batches, lambda b, m=model: _masked_mean(m, b), Schedule(5, 0.01, accumulate=accumulate))
        assert len(trained.losses) == 10
        weights.append(torch.cat([p.flatten() for p in model.parameters()]))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=0)
    model = _model()
    model[1].p = 0.0
    fit(model, _regression(model, 8, rows), lambda b: _masked_mean(model, b), Schedule(5, 0.01, accumulate=4),
        count=lambda b: 1.0)  # fmt: skip
    unweighted = torch.cat([p.flatten() for p in model.parameters()])
    assert (unweighted - weights[0]).abs().max() > 1e-4  # the weights matter here


def test_nothing_that_counts_is_refused() -> None:
    """A step of batches without any target that counts must be refused, not divided by zero."""
    model = _model()
    batches = [{"x": torch.ones(2, 4), "target": torch.full((2, 1), IGNORED)}]
    with pytest.raises(InputRefused, match="something to learn from"):
        fit(model, lambda epoch: batches, lambda b: model(b["x"]).mean(), Schedule(1, 0.01))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_learns_as_well(precision: Precision) -> None:
    """Products in half the bits must reach the loss of fp32 within a tenth, in weights that stay fp32."""
    lasts = []
    for kind in ("fp32", precision):
        model, seen = _model(), []
        model[1].p = 0.0

        def loss(batch: Batch, model: nn.Module = model, seen: list[torch.dtype] = seen) -> Tensor:
            out = model(batch["x"])
            seen.append(out.dtype)
            return (out.float() - batch["y"]).square().mean()

        trained = fit(model, _batches, loss, Schedule(30, 0.02, precision=kind))  # type: ignore[arg-type]
        assert set(seen) == {{"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[kind]}
        assert all(p.dtype == torch.float32 for p in model.parameters())
        lasts.append(sum(trained.losses[-9:]) / 9)
    assert lasts[1] < 1.1 * lasts[0] + 0.01


def test_fp16_overflow_lowers_the_scale() -> None:
    """Gradients too large for fp16 at the first scale must cost a step, not the training."""
    model = _model()
    trained = fit(model, _batches, lambda b: (model(b["x"]).float() - b["y"]).square().mean() * 1e3,
                  Schedule(20, 0.02, precision="fp16"))  # fmt: skip
    assert trained.skipped_steps > 0 and all(torch.isfinite(p).all() for p in model.parameters())
    assert trained.losses[-1] < trained.losses[0]


class _Blocks(nn.Module):
    def __init__(self, depth: int = 12, width: int = 32) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 8 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(8 * width, width))
            for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_gradient_checkpointing_keeps_less_and_gives_the_same_bits() -> None:
    """What the backward pass needs must shrink to less than half, the weights must be the same, dropout included."""
    results = []
    for on in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = _Blocks()
        kept: list[int] = []

        def loss(batch: Batch, model: nn.Module = model, kept: list[int] = kept) -> Tensor:
            sizes: dict[int, int] = {}
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.setdefault(t.data_ptr(), t.numel()) and t, lambda t: t
            ):
                value = model(batch["x"]).square().mean()
            kept.append(sum(sizes.values()))
            return value

        fit(model, lambda epoch: [{"x": torch.randn(64, 32)} for _ in range(3)], loss,
            Schedule(1, 0.01, gradient_checkpointing=on))  # fmt: skip
        assert all("forward" not in vars(block) for block in model.blocks)
        results.append((torch.cat([p.flatten() for p in model.parameters()]), kept[-1]))
    assert torch.equal(results[0][0], results[1][0]) and results[1][1] < 0.5 * results[0][1]
    with pytest.raises(UsageProblem, match="repeated blocks"):
        _train(_model(), Schedule(1, 0.01, gradient_checkpointing=True))


def test_early_stopping_keeps_the_best_weights() -> None:
    """When epochs get no better, training must end after `patience` of them with the best epoch's weights."""
    model, values, states = _model(), iter([3.0, 1.0, 2.0, 1.5, 0.1]), []

    def watch() -> float:
        assert not model.training
        states.append(model[0].weight.detach().clone())
        return next(values)

    trained = fit(model, _batches, lambda b: (model(b["x"]) - b["y"]).square().mean(), Schedule(9, 0.05, patience=2),
                  watch=watch)  # fmt: skip
    assert (trained.stopped_early, trained.best_epoch, len(trained.losses)) == (True, 1, 12)
    assert torch.equal(model[0].weight, states[1]) and not torch.equal(states[1], states[3])


def test_warmup_and_linear() -> None:
    """The rate must rise in equal parts, be highest once, then fall on a line that ends at zero after the last step."""
    schedule = Schedule(1, 0.1, shape="linear", warmup_steps=4)
    rates = [learning_rate(schedule, step, 14) for step in range(15)]
    assert rates == pytest.approx([0.02, 0.04, 0.06, 0.08, *(0.1 - 0.01 * i for i in range(11))])


def test_progress_says_loss_throughput_and_time_left() -> None:
    """About ten lines, each with a bar, the step, the loss, items per second and the time left."""
    lines: list[str] = []
    model = _model()
    fit(model, _batches, lambda b: model(b["x"]).square().mean(), Schedule(10, 0.01), progress=lines.append)
    assert len(lines) == 10 and re.fullmatch(
        r"\[#{20}\] step 30/30 loss \d\.\d{4} rate \d\.\d\de-\d\d \d+ items/s 0:00 left", lines[-1]
    )
    assert lines[4].startswith("[##########..........] step 15/30")


def test_memory_stays_flat() -> None:
    """Ten times the steps must not make the process larger by more than a megabyte and the losses themselves."""
    model = _model()
    x = torch.ones(4, 4)

    def run(steps: int) -> int:
        fit(model, lambda epoch: [{"x": x}] * 50, lambda b: model(b["x"]).square().mean(), Schedule(steps // 50, 1e-4))
        gc.collect()
        return psutil.Process().memory_info().rss

    run(100)
    assert run(1000) - run(100) < 1_000_000

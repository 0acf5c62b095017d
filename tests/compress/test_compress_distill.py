"""Distillation: the formula, the defaults, and zeros that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from deploytool.compress.distill.distill import apply
from deploytool.compress.distill.tables import Distill
from deploytool.compress.distill.temperature import cosine_loss, soft_loss
from deploytool.compress.factorize.svd import apply as factor
from deploytool.compress.factorize.tables import Svd
from deploytool.compress.fitting import any_batches
from deploytool.compress.prune.magnitude import apply as prune
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.model import open_source
from deploytool.source import ModelRef, Source


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize("temperature", [1.0, 2.5, 8.0])
def test_soft_loss_is_the_formula(temperature: float) -> None:
    """T^2 KL(teacher || student), mean over the positions, must equal NumPy's to 1e-6."""
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(4, 3, 7)) * 3, rng.normal(size=(4, 3, 7)) * 3
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum(-1).mean()
    got = soft_loss(torch.tensor(student, dtype=torch.float32), torch.tensor(teacher, dtype=torch.float32), temperature)
    assert got.item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    exact = soft_loss(torch.tensor(student), torch.tensor(teacher), temperature)
    assert exact.item() == pytest.approx(expected, abs=1e-6)
    assert soft_loss(torch.tensor(teacher), torch.tensor(teacher), temperature).item() == pytest.approx(0, abs=1e-12)


def test_gradient_keeps_its_size() -> None:
    """At high temperature the gradient must be near (student - teacher) / classes for centred logits."""
    student = torch.tensor([[0.3, -0.1, -0.2]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[-0.2, 0.4, -0.2]], dtype=torch.float64)
    soft_loss(student, teacher, 1000.0).backward()
    assert student.grad is not None
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 3, atol=1e-3, rtol=0)


def test_cosine_loss() -> None:
    """Equal directions must cost nothing, opposite ones 2."""
    x = torch.randn(3, 5)
    assert cosine_loss(x, 2 * x).item() == pytest.approx(0, abs=1e-6)
    assert cosine_loss(x, -x).item() == pytest.approx(2, abs=1e-6)


def test_zeros_survive_and_the_teacher_is_approached(tiny: Source, context: Context) -> None:
    """After pruning and distilling, exactly the pruned weights must be zero and the outputs nearer to the teacher's."""
    pruned, _ = prune(tiny, Magnitude(step="magnitude", sparsity=0.6), context)
    trained, report = apply(pruned, Distill(step="distill", alpha=1.0, epochs=20, learning_rate=0.01), context)
    for name in ("up.weight", "down.weight"):
        weight = trained.module.get_parameter(name)
        assert torch.equal(weight != 0, pruned.masks[name])
        assert not torch.equal(weight, pruned.module.get_parameter(name))
    assert report["loss_last"] < 0.5 * report["loss_first"]
    assert (report["match"], report["outputs"], report["data"]) == ("kl", ["logits"], "train_batches")
    ids = next(iter(tiny.samples()))["ids"]
    assert soft_loss(trained.flat(ids)[0], tiny.flat(ids)[0], 1) < soft_loss(pruned.flat(ids)[0], tiny.flat(ids)[0], 1)
    assert not trained.module.training and not any(p.requires_grad for p in trained.module.parameters())


def test_first_loss_is_the_mixture(tiny: Source, context: Context) -> None:
    """The first step's loss must be alpha T^2 KL + (1 - alpha) of the model's own loss on the first batch."""
    no_dropout = dataclasses.replace(tiny)
    no_dropout.module.drop.p = 0.0
    low, _ = factor(no_dropout, Svd(step="svd", rank=2), context)
    _, report = apply(low, Distill(step="distill", alpha=0.3, temperature=3.0, steps=1), context)
    assert tiny.train_batches is not None and tiny.loss is not None
    batch = next(iter(tiny.train_batches()))
    given, wanted = low.module(batch["ids"]), tiny.module(batch["ids"])
    expected = 0.3 * soft_loss(given["logits"], wanted["logits"], 3.0) + 0.7 * tiny.loss(given, batch)
    assert report["loss_first"] == pytest.approx(expected.item(), rel=1e-5)
    assert report["optimizer_steps"] == 1


def test_samples_serve_where_there_are_no_batches(tmp_path: Path, write_tiny: Callable[..., ModelRef]) -> None:
    """Without train_batches the samples must be used, cut to the recipe's length, and alpha must be 1."""
    source = open_source(write_tiny(tmp_path, hooks=False))
    context = Context(source, Calibration(samples=2, length=3), 0, lambda line: None)
    assert [tuple(s["ids"].shape) for s in context.samples(source)] == [(1, 3), (2, 3)]
    low, _ = factor(source, Svd(step="svd", rank=2), context)
    _, report = apply(low, Distill(step="distill", output="hidden", match="cosine", epochs=3), context)
    assert (report["data"], report["alpha"], report["optimizer_steps"]) == ("samples", 1.0, 6)
    with pytest.raises(UsageProblem, match="alpha must be 1"):
        apply(low, Distill(step="distill", alpha=0.5), context)


def test_the_steps_seed_orders_the_samples(tmp_path: Path, write_tiny: Callable[..., ModelRef]) -> None:
    """Where samples are what is learned from, the step's own seed must choose their order, as it does dropout."""
    source = open_source(write_tiny(tmp_path, hooks=False))
    context = Context(source, Calibration(), 0, lambda line: None)
    orders = []
    for seed in (0, 1, 2, 3, 4):
        batches, _ = any_batches(source, Distill(step="distill", seed=seed), context)
        orders.append([tuple(batch["ids"].shape) for epoch in range(3) for batch in batches(epoch)])
    assert len({str(order) for order in orders}) > 1


def test_outputs_must_be_known(tiny: Source, context: Context) -> None:
    """An unknown output, and none where there is no "logits" among several, must be refused with the names."""
    with pytest.raises(UsageProblem) as caught:
        apply(tiny, Distill(step="distill", output="logit"), context)
    assert "did you mean 'logits'?" in caught.value.detail[0]
    outputs = tuple(dataclasses.replace(spec, name=f"{spec.name}_x") for spec in tiny.signature.outputs)
    renamed = dataclasses.replace(tiny, signature=dataclasses.replace(tiny.signature, outputs=outputs))
    with pytest.raises(UsageProblem, match="which output"):
        apply(renamed, Distill(step="distill"), context)


def test_batches_must_hold_the_inputs(tiny: Source, context: Context) -> None:
    """A batch without one of the model's inputs must be refused, naming it."""
    wrong = dataclasses.replace(tiny, train_batches=lambda: [{"idz": torch.zeros(1, 2, dtype=torch.int64)}])
    with pytest.raises(InputRefused, match="missing: ids") as caught:
        apply(wrong, Distill(step="distill"), context)
    assert "idz" in caught.value.detail[0]

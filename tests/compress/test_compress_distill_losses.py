"""The kernels of distillation against their formulas, computed again in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deploytool.compress.distill.cached import lengthened, shortened
from deploytool.compress.distill.drop_layers import spread_evenly
from deploytool.compress.distill.inner import uniform_map
from deploytool.compress.distill.relation import relation_loss
from deploytool.compress.distill.temperature import temperature_at
from deploytool.compress.distill.token_scaled import token_scaled_loss, token_weights


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


@pytest.mark.parametrize("tau", [0.5, 10.0])
def test_token_scaled_loss_is_the_formula(tau: float) -> None:
    """The loss on fixed tensors must equal NumPy's sum over batch and tokens to 1e-6, hidden tokens left out."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(3, 5, 7)) * 2, rng.normal(size=(3, 5, 7)) * 2
    labels = rng.integers(0, 7, (3, 5))
    labels[1, 3:] = -100
    expected = 0.0
    for z_s, z_t, y in zip(student, teacher, labels, strict=True):
        counts = y != -100
        p, q = _softmax(z_t[counts]), _softmax(z_s[counts])
        c = -np.log(p[np.arange(counts.sum()), y[counts]])
        w = np.exp(c / tau) / np.exp(c / tau).sum()
        expected += (w * -(p * np.log(q)).sum(-1)).sum()
    given = token_scaled_loss(torch.tensor(student), torch.tensor(teacher), torch.tensor(labels), tau)
    assert given.item() == pytest.approx(expected, abs=1e-6)
    single = (torch.tensor(x, dtype=torch.float32) for x in (student, teacher))
    assert token_scaled_loss(*single, torch.tensor(labels), tau).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_hard_tokens_count_for_more() -> None:
    """Weights must sum to 1 per sequence, be larger where the teacher is more wrong, and carry no gradient."""
    teacher = torch.tensor([[[4.0, 0.0], [0.0, 4.0]]], requires_grad=True)
    weights = token_weights(teacher, torch.zeros(1, 2, dtype=torch.int64), 1.0)
    assert weights.sum().item() == pytest.approx(1) and weights[0, 1] > 0.9 and not weights.requires_grad


def test_relation_loss_is_the_formula() -> None:
    """Mean KL of softmax(X X^T / sqrt(d)) per head must equal NumPy's, for widths that differ."""
    rng = np.random.default_rng(1)
    student, teacher, heads = rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 4, 10)), 2

    def relations(x: np.ndarray) -> np.ndarray:
        cut = x.reshape(2, 4, heads, -1).transpose(0, 2, 1, 3)
        return _softmax(cut @ cut.transpose(0, 1, 3, 2) / np.sqrt(cut.shape[-1]))

    p, q = relations(teacher), relations(student)
    given = relation_loss(torch.tensor(student), torch.tensor(teacher), heads).item()
    assert given == pytest.approx((p * np.log(p / q)).sum(-1).mean(), abs=1e-9)
    assert relation_loss(torch.tensor(teacher), torch.tensor(teacher), heads).item() == pytest.approx(0, abs=1e-12)


def test_temperature_falls_to_its_floor() -> None:
    """A line from 2 to 0 must never come below the floor, so that nothing is divided by 0."""
    line = [temperature_at(step, 9, 2.0, 0.0, 0.5) for step in range(9)]
    assert line == [2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.5, 0.5]
    assert temperature_at(0, 1, 2.0, 1.0, 0.5) == 2.0


def test_which_layers_belong_together() -> None:
    """Kept layers must hold the first and last; student layers must learn from evenly spread ones up to the last."""
    assert spread_evenly(12, 6) == [0, 2, 4, 7, 9, 11] and spread_evenly(4, 2) == [0, 3] and spread_evenly(3, 1) == [0]
    assert uniform_map(2, 4) == [1, 3] and uniform_map(3, 12) == [3, 7, 11] and uniform_map(4, 4) == [0, 1, 2, 3]


def test_largest_logits_keep_their_probabilities() -> None:
    """Of 50 classes the 5 largest must keep their logits exactly, and all together must have probability 1 still."""
    row = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 3
    back = lengthened(shortened(row, 5), (3, 50), 5)
    top = row.topk(5, -1)
    assert torch.equal(back.gather(-1, top.indices), top.values)
    torch.testing.assert_close(back.logsumexp(-1), row.logsumexp(-1))
    assert torch.equal(lengthened(shortened(row, None), (3, 50), None), row)
    assert torch.equal(lengthened(shortened(row, 50), (3, 50), 50), row)

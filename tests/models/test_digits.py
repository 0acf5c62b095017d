"""The digits transformer on the held-out scans."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
from torch import nn


def test_accuracy_on_held_out_digits(source: Callable[[str], ModuleType], model: Callable[[str], nn.Module]) -> None:
    """At least 98 % of the 450 held-out digits must be named right."""
    digits = model("digits")
    with torch.inference_mode():
        assert source("digits").evaluate(lambda feeds: digits(**feeds))["accuracy"] >= 0.98


def test_held_out_digits_are_not_trained_on(source: Callable[[str], ModuleType]) -> None:
    """No held-out image may be among the training batches."""
    digits = source("digits")
    trained = {image.numpy().tobytes() for batch in digits.train_batches() for image in batch["image"]}
    assert len(trained) == 1347
    held_out = {image.numpy().tobytes() for sample in digits.samples() for image in sample["image"]}
    assert not trained & held_out


def test_heads_can_be_cut_from_the_projections(source: Callable[[str], ModuleType]) -> None:
    """Attention must keep working when rows of whole heads are removed from its linears."""
    attention = source("digits").Attention(width=64, head_dim=8).eval()
    image = torch.randn(2, 16, 64)
    whole = attention(image)
    for projection in (attention.q, attention.k, attention.v):
        projection.weight = nn.Parameter(projection.weight[:16])
        projection.bias = nn.Parameter(projection.bias[:16])
    attention.out.weight = nn.Parameter(attention.out.weight[:, :16])
    assert attention(image).shape == whole.shape

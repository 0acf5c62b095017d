"""Searches over a tiny model, whose builds are real and whose speed is planted where a test needs to know it."""

from __future__ import annotations

from pathlib import Path

import pytest

TINY = """
import torch
from torch import nn

def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))

def samples():
    random = torch.Generator().manual_seed(0)
    return [{"input": torch.randn(n, 8, generator=random)} for n in (1, 2, 3)]

def evaluate(predict):
    return {"share": (predict(samples()[2])["output"] > 0).float().mean().item()}
"""


@pytest.fixture
def model(cache: Path) -> str:
    """A model file of two layers: in one place for all tests, so that it is lowered once."""
    path = cache / "models" / "tuned.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(TINY)
    return str(path)

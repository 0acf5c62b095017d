"""Operations of a run, counted on models whose number is known."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from deploytool.cases import Case
from deploytool.load.flops import flops_job

MODEL = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 32)
        self.last = nn.Conv1d(1, 4, 3)

    def forward(self, x):
        return self.last(self.first(x).unsqueeze(1))

def build():
    return Net().eval()

def samples():
    return [{"x": torch.ones(n, 8)} for n in (1, 2, 3)]
"""


def test_products_and_convolutions_are_counted(tmp_path: Path) -> None:
    """A linear of 8 to 32 and a convolution of 3 taps to 4 channels over 30 places, for two rows, twice per weight."""
    path = tmp_path / "counted.py"
    path.write_text(MODEL)
    Case({"x": np.ones((2, 8), dtype=np.float32)}).save(tmp_path / "case.npz")
    ref = {"kind": "python", "name": "counted", "path": str(path)}
    assert flops_job(ref, str(tmp_path / "case.npz")) == 2 * 2 * (8 * 32 + 3 * 4 * 30)

"""The reference's own noise: right on modules whose answer is known, and reasons where it cannot be taken."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from deploytool.lower import noise as lower_noise
from deploytool.lower.noise import noise_job
from deploytool.lower.prepare import prepare_job
from deploytool.source import ModelRef
from deploytool.storage import read_json

HEAD = """
import torch
from torch import nn

def samples():
    random = torch.Generator().manual_seed(0)
    return [{{"input": torch.randn(n, 64, generator=random)}} for n in (1, 2, 3)]

def build():
    torch.manual_seed(0)
    return {}
"""


def measured(tmp_path: Path, module: str) -> Any:
    file = tmp_path / "m.py"
    file.write_text(HEAD.format(module))
    ref = asdict(ModelRef("python", "m", str(file)))
    (tmp_path / "prepared").mkdir()
    prepare_job(ref, str(tmp_path / "prepared"), None, 0)
    found = noise_job(ref, str(tmp_path / "prepared"))
    assert read_json(tmp_path / "prepared" / "noise.json") == found
    return found


def test_each_precision_has_its_noise(tmp_path: Path) -> None:
    """Double precision and shuffled sums must differ by roundings of fp32, half and int8 by their own steps."""
    noise = measured(tmp_path, "nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))")
    figures = noise["outputs"]["output"]
    assert noise["skipped"] == {}
    assert 1e-8 < figures["fp64"] < 5e-6 and 1e-8 < figures["shuffled"] < 5e-6
    assert 1e-5 < figures["fp16"] < 5e-3 and 1e-3 < figures["int8"] < 0.1


def test_a_large_model_loses_only_what_needs_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory holds no copy, what needs none is measured all the same, and the module is as it was."""
    module = "nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))"
    right = measured(tmp_path, module)
    monkeypatch.setattr(lower_noise, "_SHARE_OF_MEMORY", 1e-12)
    (tmp_path / "b").mkdir()
    found = measured(tmp_path / "b", module)
    assert {name: value for name, value in right["outputs"]["output"].items() if name in ("shuffled", "int8")} == (
        found["outputs"]["output"])  # fmt: skip
    assert "MB of memory are free" in found["skipped"]["fp64"] and "fp16" in found["skipped"]


def test_cancellation_shows_as_noise(tmp_path: Path) -> None:
    """A model that takes the difference of nearly equal numbers must be told to be noisy."""
    steady = measured(tmp_path, "nn.Linear(64, 8)")["outputs"]["output"]["fp64"]
    (tmp_path / "b").mkdir()
    module = """nn.Sequential(nn.Linear(64, 64), Offset(1e4), Offset(-1e4))

class Offset(nn.Module):
    def __init__(self, by):
        super().__init__()
        self.by = by
    def forward(self, input):
        return input + self.by"""
    noisy = measured(tmp_path / "b", module)["outputs"]["output"]["fp64"]
    assert noisy > 50 * steady


def test_what_cannot_be_measured_is_told(tmp_path: Path) -> None:
    """A module that insists on fp32 must lose that figure, with the reason, and keep the others."""
    module = """Insists()

class Insists(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 8)
    def forward(self, input):
        assert input.dtype == torch.float32, "fp32 only"
        return self.inner(input)"""
    noise = measured(tmp_path, module)
    assert "fp32 only" in noise["skipped"]["fp64"] and {"shuffled", "fp16", "int8"} <= noise["outputs"]["output"].keys()

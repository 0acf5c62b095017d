"""Which samples compression steps look at."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import Source

MODEL = """
import torch
from torch import nn

INPUTS = {"input": ("batch", 3)}

def build():
    return nn.Linear(3, 2)

def samples():
    return [{"input": torch.zeros(n, 3)} for n in (1, 2, 4)]
"""


def _context(path: Path, count: int) -> tuple[Context, list[dict[str, torch.Tensor]]]:
    source = open_source(resolve(str(path)))
    context = Context(source, Calibration(samples=count), 0, lambda line: None)
    return context, context.samples(source)


def test_calibration_of_the_model_file_goes_first(tmp_path: Path) -> None:
    """Steps must look at calibration() where the file has it, at the samples where not, and at no more than asked."""
    path = tmp_path / "m.py"
    path.write_text(MODEL)
    assert [len(s["input"]) for s in _context(path, 2)[1]] == [1, 2]
    other = tmp_path / "n.py"
    other.write_text(MODEL + "\ndef calibration():\n    return ({'input': torch.ones(7, 3)} for _ in range(5))\n")
    context, taken = _context(other, 4)
    assert [s["input"].shape[0] for s in taken] == [7] * 4 and bool((taken[0]["input"] == 1).all())
    assert len(context.samples(context.original)) == 4, "calibration() is called anew each time"


def test_calibration_must_be_a_function(tmp_path: Path) -> None:
    """A list in its place must be refused as any other hook of the wrong kind."""
    path = tmp_path / "m.py"
    path.write_text(MODEL + "\ncalibration = []\n")
    with pytest.raises(InputRefused, match="hooks as documented"):
        open_source(resolve(str(path)))


@pytest.mark.parametrize(("model", "step"), [
    ("digits", {"step": "svd", "budget": 0.5, "include": ["blocks.*"]}), ("digits", {"step": "fnet"}),
    ("tiny", {"step": "low-rank-embedding", "rank": 2}),
])  # fmt: skip
def test_steps_that_measure_need_samples(tiny: Source, model: str, step: dict[str, Any]) -> None:
    """Where calibration() gives nothing, what follows from measuring must be refused, not done without."""
    source = tiny if model == "tiny" else open_source(resolve(model))
    empty = dataclasses.replace(source, calibration=lambda: iter([]))
    with pytest.raises(InputRefused, match="at least one sample"):
        compress(empty, parse_recipe({"compress": [step]}, "", where="recipe"), evaluate=False)

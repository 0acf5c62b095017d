"""The shipped presets on a shipped model, cut to a few steps; the order prune, quantize, distill."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from deploytool.compress.recipe import Recipe, find_recipe, load_recipe
from deploytool.compress.run import compress
from deploytool.compress.training import TrainingTable
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve


def _short(name: str, folder: Path) -> Recipe:
    """A shipped recipe with five optimizer steps at most, and checkpoints in a folder of the test."""
    recipe = load_recipe(find_recipe(name))
    steps = tuple(s.model_copy(update={"steps": 5}) if isinstance(s, TrainingTable) else s for s in recipe.steps)
    training = recipe.training.model_copy(update={"checkpoints": str(folder)})
    return dataclasses.replace(recipe, steps=steps, training=training)


@pytest.mark.parametrize(("name", "smaller", "zeros"), [
    ("light", True, 0.29), ("production", True, 0.0), ("development", False, 0.0), ("digits-ordered", True, 0.45),
])  # fmt: skip
def test_presets(name: str, smaller: bool, zeros: float, tmp_path: Path) -> None:
    """Each must run on digits and keep 97 % of its accuracy; pruned weights stay zero, rounded ones on grids."""
    pytest.importorskip("sklearn")
    source = open_source(resolve("digits"))
    result, report = compress(source, _short(name, tmp_path))
    before, after = report["before"], report["after"]
    assert after["metrics"]["accuracy"] >= 0.97 * before["metrics"]["accuracy"]
    assert (after["size_bytes"] < 0.5 * before["size_bytes"]) is smaller
    assert after["nonzeros"] <= (1 - zeros) * before["nonzeros"] and bool(result.encodings) is smaller
    for parameter, encoding in result.encodings.items():
        assert lies_on(result.module.get_parameter(parameter), encoding)
    for parameter, mask in result.masks.items():
        assert not result.module.get_parameter(parameter)[~mask].any()
    trained = [step for step in report["steps"] if "loss_curve" in step]
    assert len(list(tmp_path.rglob("step-000000005.safetensors"))) == len(trained) == (name != "light")

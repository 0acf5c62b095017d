"""Pruning that looks at samples, as steps on whole models: counts, masks, order of quality, and clear refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from deploytool.compress.prune import magnitude, sparsegpt, wanda
from deploytool.compress.prune.tables import Magnitude, SparseGpt, Wanda
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import Source

STEPS: dict[str, tuple[Any, Any]] = {
    "magnitude": (magnitude.apply, Magnitude), "wanda": (wanda.apply, Wanda), "sparsegpt": (sparsegpt.apply, SparseGpt),
}  # fmt: skip
LINEARS = ("blocks.*",)


@pytest.fixture(scope="module")
def digits() -> Source:
    return open_source(resolve("digits"))


def _run(source: Source, step: str, samples: int = 8, **settings: Any) -> tuple[Source, dict[str, Any]]:
    apply, table = STEPS[step]
    context = Context(source, Calibration(samples=samples), 0, lambda line: None)
    changed, report = apply(source, table(step=step, **settings), context)
    return changed, report


def _logits(source: Source) -> Tensor:
    with torch.no_grad():
        return torch.cat([source.module(s["image"])["logits"] for s in source.samples()])


def test_quality_follows_the_work(digits: Source) -> None:
    """At the same share of zeros Wanda must lose less than magnitude, SparseGPT less, and repaired the least."""
    wanted = _logits(digits)
    lost = {}
    for name, step, more in (*((s, s, {}) for s in STEPS), ("repaired", "sparsegpt", {"repair": True})):
        pruned, report = _run(digits, step, sparsity=0.6, include=LINEARS, **more)
        lost[name] = float((_logits(pruned) - wanted).square().mean())
        assert len(report["layers"]) == 24 and all(abs(e["sparsity"] - 0.6) < 0.01 for e in report["layers"])
    assert lost["repaired"] < lost["sparsegpt"] < lost["wanda"] < lost["magnitude"]


@pytest.mark.parametrize("step", list(STEPS))
def test_patterns_hold_in_the_model(digits: Source, step: str) -> None:
    """2:4 must leave at most two of every four neighbours in every chosen layer, masked; the rest untouched."""
    pruned, report = _run(digits, step, pattern="2:4", include=LINEARS)
    assert len(report["layers"]) == len(pruned.masks) == 24
    for name, mask in pruned.masks.items():
        weight = pruned.module.get_parameter(name)
        assert int((weight.view(len(weight), -1, 4) != 0).sum(-1).max()) == 2
        assert bool((weight[~mask] == 0).all()) and int(mask.sum()) == weight.numel() // 2
    assert {e["layer"] for e in report["skipped"]} >= {"patch", "head"}
    assert torch.equal(pruned.module.head.weight, digits.module.head.weight)


@pytest.mark.parametrize("step", ["wanda", "sparsegpt"])
def test_two_runs_are_bit_identical_and_the_source_stays(digits: Source, step: str) -> None:
    """The same step must give the same bits twice, and never write to the source's own tensors."""
    before = {name: t.clone() for name, t in digits.module.state_dict().items()}
    one, two = (_run(digits, step, sparsity=0.5)[0].module.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(torch.equal(t, before[name]) for name, t in digits.module.state_dict().items())
    assert any(not torch.equal(one[name], before[name]) for name in one)


@pytest.mark.parametrize("step", ["wanda", "sparsegpt"])
def test_convolutions_are_pruned_too(step: str) -> None:
    """Kernels of convolutions must get their zeros by what their patches hold."""
    pruned, report = _run(open_source(resolve("mnistcnn")), step, samples=2, sparsity=0.5)
    kernels = [e for e in report["layers"] if pruned.module.get_parameter(e["layer"]).ndim == 4]
    assert kernels and all(abs(e["sparsity"] - 0.5) < 0.06 for e in kernels)


@pytest.mark.parametrize("step", ["wanda", "sparsegpt"])
def test_zeros_add_up(digits: Source, step: str) -> None:
    """A second pruning must keep the first one's zeros."""
    once, _ = _run(digits, step, sparsity=0.3, include=LINEARS)
    twice, _ = _run(once, step, sparsity=0.6, include=LINEARS)
    for name, mask in once.masks.items():
        assert not (twice.masks[name] & ~mask).any()
        assert abs(float((~twice.masks[name]).float().mean()) - 0.6) < 0.01


@pytest.mark.parametrize("step", list(STEPS))
def test_wrong_asks_are_refused(digits: Source, step: str) -> None:
    """A pattern of names without a match, and N:M that does not divide, must say so."""
    with pytest.raises(UsageProblem, match="no match for"):
        _run(digits, step, sparsity=0.5, include=("blokcs.*",))
    with pytest.raises(UsageProblem, match="must divide the row length"):
        _run(digits, step, pattern="2:3", include=LINEARS)


@pytest.mark.parametrize("step", ["wanda", "sparsegpt"])
def test_wrong_samples_are_refused(digits: Source, step: str) -> None:
    """No samples and samples with NaN must be errors, not zeros somewhere."""
    with pytest.raises(InputRefused, match="at least one sample"):
        _run(dataclasses.replace(digits, samples=lambda: iter(())), step, sparsity=0.5)
    broken = [{"image": torch.full((1, 1, 8, 8), float("nan"))}]
    with pytest.raises(InputRefused, match="must be finite"):
        _run(dataclasses.replace(digits, samples=lambda: iter(broken)), step, sparsity=0.5)


def test_zeros_and_grid_in_one_pass(digits: Source) -> None:
    """With bits every pruned weight must lie on its grid, which travels with the model, and hold the pattern too."""
    pruned, _ = _run(digits, "sparsegpt", pattern="2:4", bits=4, group=32, include=LINEARS)
    assert set(pruned.encodings) == set(pruned.masks) and len(pruned.masks) == 24
    for name, grid in pruned.encodings.items():
        weight = pruned.module.get_parameter(name)
        assert lies_on(weight, grid) and grid.bits == 4
        assert int((weight.view(len(weight), -1, 4) != 0).sum(-1).max()) <= 2

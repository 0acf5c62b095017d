"""Pruning that looks at samples, as steps on whole models: counts, masks, order of quality, and clear refusals."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu

from deploytool.compress.blocks import Block, Stage
from deploytool.compress.prune import magnitude, sparsegpt, wanda
from deploytool.compress.prune.tables import Magnitude, SparseGpt, Wanda
from deploytool.compress.step import Calibration, Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.flat import FlatModule
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import with_module
from deploytool.signature import Signature, TensorSpec
from deploytool.source import ModelRef, Source

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


class _Decoder(nn.Module):
    """A block of a language model: attention, and a gated network, each added to what came in."""

    def __init__(self, width: int):
        super().__init__()
        self.one, self.two = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, 3 * width, bias=False)
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.one(x)
        x = x + self.o(scaled_dot_product_attention(self.q(h), self.k(h), self.v(h), is_causal=True))
        h = self.two(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


@pytest.fixture(scope="module")
def deep() -> Source:
    """Twenty random blocks, strong enough that what one loses shows in the next; 12 samples, of which 8 calibrate."""
    width = 16
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = nn.Sequential(*(_Decoder(width) for _ in range(20)))
        for parameter in module.eval().requires_grad_(False).parameters():
            parameter.mul_(1.5 if parameter.ndim == 2 else 1.0)
        mix = torch.randn(width, width) * torch.logspace(-1, 0.5, width)
        samples = [{"input": torch.randn(1, 48, width) @ mix} for _ in range(12)]
    shape = ("batch", "sequence", width)
    signature = Signature((TensorSpec("input", "float32", shape),), (TensorSpec("output", "float32", shape),))
    flat = FlatModule(module, ("input",), ("output",))
    return Source(ModelRef("python", "deep", ""), module, flat, signature, samples=lambda: iter(samples))


def _lost(source: Source, pruned: Source) -> float:
    """Squared error of the outputs on the samples that did not calibrate, relative."""
    held = [sample["input"] for sample in source.samples()][8:]
    pairs = [(source.module(x), pruned.module(x)) for x in held]
    return sum(float((a - b).square().sum()) for a, b in pairs) / sum(float(a.square().sum()) for a, _ in pairs)


def test_repair_helps_deep_models(deep: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """Repair must lose less than none over many blocks; with all layers of a block fitted at one look it loses more."""
    lost = {}
    for name, repair in (("plain", False), ("repaired", True)):
        lost[name] = _lost(deep, _run(deep, "sparsegpt", sparsity=0.5, repair=repair)[0])
    monkeypatch.setattr(Block, "stages", lambda block: [Stage(tuple(block.layers), False)])
    lost["one look"] = _lost(deep, _run(deep, "sparsegpt", sparsity=0.5, repair=True)[0])
    assert lost["repaired"] < 0.85 * lost["plain"]
    assert lost["one look"] > lost["plain"]


def test_in_place_changes_the_given_module(deep: Source) -> None:
    """In place the given module must get the very weights that a copy gets."""
    for repair in (False, True):
        settings = SparseGpt(step="sparsegpt", sparsity=0.5, repair=repair, include=("0.*", "1.*"))
        context = Context(deep, Calibration(samples=4), 0, lambda line: None)
        copied, _ = sparsegpt.apply(deep, settings, context)
        mine = with_module(deep, copy.deepcopy(deep.module))
        changed, _ = sparsegpt.apply(mine, settings, context, in_place=True)
        assert changed.module is mine.module
        wanted = copied.module.state_dict()
        assert all(torch.equal(tensor, wanted[name]) for name, tensor in mine.module.state_dict().items())

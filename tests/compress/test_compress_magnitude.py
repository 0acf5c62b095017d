"""Magnitude pruning: exact counts, the right weights, nothing else touched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from deploytool.compress.prune.magnitude import apply, keep_mask, keep_masks
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.source import Source


@pytest.mark.parametrize("zeros", [0, 1, 17, 59, 60])
def test_mask_is_numpys_stable_choice(zeros: int) -> None:
    """The mask must drop exactly what a stable sort by magnitude puts first, also among equal magnitudes."""
    weight = torch.randint(-4, 5, (6, 10), generator=torch.Generator().manual_seed(3)).float()
    expected = np.ones(60, bool)
    expected[np.argsort(np.abs(weight.numpy()).ravel(), kind="stable")[:zeros]] = False
    np.testing.assert_array_equal(keep_mask(weight, zeros).numpy().ravel(), expected)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.33, 0.5, 0.9, 0.98])
def test_counts_are_exact(sparsity: float) -> None:
    """ "tensor" must zero round(s n) of every weight, "global" round(s n) of all together."""
    weights = [torch.randn(7, 9), torch.randn(31), torch.randn(2, 3, 4) * 10]
    for weight, mask in zip(weights, keep_masks(weights, sparsity, "tensor"), strict=True):
        assert int((~mask).sum()) == round(sparsity * weight.numel())
    masks = keep_masks(weights, sparsity, "global")
    assert sum(int((~m).sum()) for m in masks) == round(sparsity * sum(w.numel() for w in weights))
    dropped = [w[~m].abs().max() for w, m in zip(weights, masks, strict=True) if (~m).any()]
    kept = [w[m].abs().min() for w, m in zip(weights, masks, strict=True) if m.any()]
    assert not dropped or max(dropped) <= min(kept)


def test_step_zeroes_copies_and_reports(tiny: Source, context: Context) -> None:
    """Chosen weights must get exact zeros in a copy; embedding, tied head and norm stay, each with its reason."""
    before = {name: tensor.clone() for name, tensor in tiny.module.state_dict().items()}
    pruned, report = apply(tiny, Magnitude(step="magnitude", sparsity=0.5), context)
    assert {layer["layer"]: layer["zeros"] for layer in report["layers"]} == {"up.weight": 240, "down.weight": 240}
    reasons = {entry["layer"]: entry["reason"] for entry in report["skipped"]}
    assert set(reasons) == {"embed", "norm", "head"} and "embedding embed.weight" in reasons["head"]
    after = pruned.module.state_dict()
    assert {n for n in after if not torch.equal(after[n], before[n])} == {"up.weight", "down.weight"}
    assert all(torch.equal(before[n], t) for n, t in tiny.module.state_dict().items())
    kept = after["up.weight"] != 0
    assert torch.equal(after["up.weight"][kept], before["up.weight"][kept])
    sample = next(iter(tiny.samples()))["ids"]
    assert torch.equal(pruned.flat(sample)[0], pruned.module(sample)["logits"])
    assert not torch.equal(pruned.flat(sample)[0], tiny.flat(sample)[0])


def test_a_second_pruning_adds_to_the_first(tiny: Source, context: Context) -> None:
    """What is zero must stay masked when more is pruned, and when less is asked."""
    once, _ = apply(tiny, Magnitude(step="magnitude", sparsity=0.5), context)
    more, _ = apply(once, Magnitude(step="magnitude", sparsity=0.75), context)
    less, _ = apply(more, Magnitude(step="magnitude", sparsity=0.25), context)
    assert not (more.masks["up.weight"] & ~once.masks["up.weight"]).any()
    assert int((~more.masks["up.weight"]).sum()) == 360
    assert torch.equal(less.masks["up.weight"], more.masks["up.weight"])


def test_patterns_choose_layers(tiny: Source, context: Context) -> None:
    """include and exclude must choose; a pattern without a match must be refused with the candidates."""
    _, report = apply(tiny, Magnitude(step="magnitude", sparsity=0.5, include=("u*",)), context)
    assert [layer["layer"] for layer in report["layers"]] == ["up.weight"]
    with pytest.raises(UsageProblem) as caught:
        apply(tiny, Magnitude(step="magnitude", sparsity=0.5, exclude=("donw",)), context)
    assert caught.value.exit_code == 2
    assert "candidate: up" in caught.value.detail and "did you mean 'down'?" in caught.value.detail[0]
    with pytest.raises(UsageProblem):
        apply(tiny, Magnitude(step="magnitude", sparsity=0.5, include=("up",), exclude=("up",)), context)


def test_kernels_of_convolutions_are_pruned() -> None:
    """A convolution's kernel is a weight like any other."""
    from deploytool.compress.prune.magnitude import _candidates

    found, skipped = _candidates(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ConvTranspose1d(2, 2, 3)))
    assert set(found) == {"0.weight", "2.weight"} and [s["layer"] for s in skipped] == ["1"]

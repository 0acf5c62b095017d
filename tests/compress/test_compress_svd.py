"""SVD factorization: the nearest matrix of a rank, as two plain linears, only where that saves."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from deploytool.compress.factorize.ranks import rank_for_energy, rank_for_keep
from deploytool.compress.factorize.svd import apply, balanced_factors
from deploytool.compress.factorize.tables import Svd
from deploytool.compress.prune.magnitude import apply as prune
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.step import Context
from deploytool.load.surgery import with_module
from deploytool.source import Source


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_product_is_numpys_truncated_svd(rank: int) -> None:
    """B A must be the truncated SVD that NumPy gives, and both factors must have equal Frobenius norms."""
    weight = np.random.default_rng(0).normal(size=(12, 8))
    u, s, vh = np.linalg.svd(weight, full_matrices=False)
    first, second = balanced_factors(*torch.linalg.svd(torch.tensor(weight), full_matrices=False), rank)
    assert first.shape == (rank, 8) and second.shape == (12, rank)
    np.testing.assert_allclose((second @ first).numpy(), u[:, :rank] * s[:rank] @ vh[:rank], atol=1e-12)
    assert torch.linalg.norm(first).item() == pytest.approx(torch.linalg.norm(second).item())


def test_rank_for_energy_is_the_smallest() -> None:
    """The rank must hold the wanted share of squared singular values, and one less must not."""
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])
    for energy in (0.1, 0.5, 16 / 30, 0.54, 0.9, 0.97, 1.0):
        rank = rank_for_energy(s, energy)
        share = s.double().square().cumsum(0) / 30
        assert share[rank - 1] >= energy - 1e-12 and (rank == 1 or share[rank - 2] < energy)


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.9])
def test_rank_for_keep_fills_the_budget(keep: float) -> None:
    """The rank must be the largest within the budget of weights."""
    rank = rank_for_keep(40, 12, keep)
    assert rank * 52 <= keep * 480 < (rank + 1) * 52


def test_step_replaces_where_it_saves(tiny: Source, context: Context) -> None:
    """Layers must become Sequential(Linear, Linear) of the rank; the tied head stays with its reason."""
    low, report = apply(tiny, Svd(step="svd", rank=4), context)
    pair = low.module.up
    assert type(pair) is nn.Sequential and [type(layer) for layer in pair] == [nn.Linear, nn.Linear]
    assert pair[0].bias is None and torch.equal(pair[1].bias, tiny.module.up.bias)
    u, s, vh = np.linalg.svd(tiny.module.up.weight.numpy(), full_matrices=False)
    np.testing.assert_allclose((pair[1].weight @ pair[0].weight).numpy(), u[:, :4] * s[:4] @ vh[:4], atol=1e-6)
    assert [layer["layer"] for layer in report["layers"]] == ["up", "down"]
    assert report["layers"][0]["energy"] == pytest.approx(float((s[:4] ** 2).sum() / (s**2).sum()), rel=1e-6)
    assert report["skipped"] == [{"layer": "head", "reason": "its weight is shared with embed.weight"}]
    assert low.module.head.weight is low.module.embed.weight
    assert low.edits == ({"kind": "linear_pair", "layer": "up", "rank": 4},
                         {"kind": "linear_pair", "layer": "down", "rank": 4})  # fmt: skip
    assert type(tiny.module.up) is nn.Linear


def test_layers_that_would_grow_are_left_alone(tiny: Source, context: Context) -> None:
    """rank (in + out) >= in out must leave the layer as it is: 10 * 52 >= 480 but 9 * 52 < 480."""
    grown, report = apply(tiny, Svd(step="svd", rank=10), context)
    assert report["layers"] == [] and grown.edits == () and type(grown.module.up) is nn.Linear
    assert "save" in next(s["reason"] for s in report["skipped"] if s["layer"] == "up")
    assert len(apply(tiny, Svd(step="svd", rank=9), context)[1]["layers"]) == 2


def test_factored_layers_lose_their_mask(tiny: Source, context: Context) -> None:
    """A product of factors is dense: the mask of a pruned layer must go, and the report must say so."""
    pruned, _ = prune(tiny, Magnitude(step="magnitude", sparsity=0.5), context)
    low, report = apply(pruned, Svd(step="svd", rank=4, include=("up",)), context)
    assert report["layers"][0]["zeros_lost"] is True and set(low.masks) == {"down.weight"}


def test_layers_that_are_read_by_their_parent_stay(tiny: Source, context: Context) -> None:
    """torch's own encoder layer reads linear1.weight itself; factoring it would break the model."""
    module = nn.TransformerEncoderLayer(16, 2, 64, batch_first=True)
    _, report = apply(dataclasses.replace(tiny, module=module), Svd(step="svd", rank=2), context)
    assert report["layers"] == [] and len(report["skipped"]) == 3
    assert "TransformerEncoderLayer reads" in str(report["skipped"])


def test_dynamic_quantization_takes_the_pair(tiny: Source, context: Context) -> None:
    """quantize_dynamic must find both linears of a pair and give nearly the same outputs."""
    low, _ = apply(tiny, Svd(step="svd", rank=6), context)
    low = with_module(low, low.module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(low.module, {"up", "down"} | {nn.Linear}, torch.qint8)
    assert all("quantized" in type(layer).__module__ for layer in (*quantized.up, *quantized.down))
    ids = next(iter(tiny.samples()))["ids"]
    expected, got = low.module(ids)["hidden"], quantized(ids)["hidden"]
    assert torch.nn.functional.cosine_similarity(expected.flatten(), got.flatten(), dim=0) > 0.99

"""Tucker-2 of convolutions and low-rank embeddings: right products, real savings, folders that open."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.factorize import embedding
from deploytool.compress.factorize.embedding import weighted_factors
from deploytool.compress.factorize.tables import LowRankEmbedding, Tucker
from deploytool.compress.factorize.tucker import apply, ranks_for_energy, ranks_for_keep, tucker2
from deploytool.compress.run import compress_job
from deploytool.compress.step import Calibration, Context
from deploytool.errors import UsageProblem
from deploytool.load.factors import embedding_pair, tucker_layers
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import Source


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _product(into: Tensor, core: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("op,pqxy,iq->oixy", out, core, into)


def test_full_ranks_lose_nothing_and_a_low_rank_kernel_is_found() -> None:
    """Full ranks must give the kernel back; a kernel that has ranks 2 and 3 must be found exactly with these."""
    kernel = _random(6, 5, 3, 3)
    torch.testing.assert_close(_product(*tucker2(kernel, 5, 6)), kernel)
    made = _product(_random(5, 2, seed=1), _random(3, 2, 3, 3, seed=2), _random(6, 3, seed=3))
    torch.testing.assert_close(_product(*tucker2(made, 2, 3)), made)
    assert ranks_for_energy(made, 1.0 - 1e-12) == (2, 3)
    wide = _random(20, 1, 2, 2)  # more outputs asked for than the kernel has directions
    torch.testing.assert_close(_product(*tucker2(wide, 1, 8)), wide)


def test_iteration_is_better_than_truncation() -> None:
    """Factors must be orthonormal, and the error no larger than that of the truncated singular vectors."""
    kernel = _random(8, 7, 3, 3)
    into, core, out = tucker2(kernel, 3, 4)
    for factor in (into, out):
        torch.testing.assert_close(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64))
    starts = [torch.linalg.svd(x.flatten(1), full_matrices=False).U for x in (kernel.transpose(0, 1), kernel)]
    truncated = torch.einsum("oixy,op,iq->pqxy", kernel, starts[1][:, :4], starts[0][:, :3])
    assert core.square().sum() > truncated.square().sum()


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_ranks_for_keep_fill_the_budget(keep: float) -> None:
    """The layers must have at most the share of weights, and nearly all of it."""
    kernel = _random(32, 24, 3, 3)
    inputs, outputs = ranks_for_keep(kernel, keep)
    weights = 24 * inputs + inputs * outputs * 9 + outputs * 32
    assert 0.8 * keep * kernel.numel() < weights <= keep * kernel.numel()


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"stride": 2, "padding": "valid"}, {"padding": "same", "dilation": 2},
    {"padding": 1, "padding_mode": "reflect", "bias": False},
])  # fmt: skip
def test_layers_are_the_convolution(options: dict[str, Any]) -> None:
    """With full ranks the three layers must give the convolution's outputs, whatever its stride and padding."""
    old = nn.Conv2d(4, 6, 3, **options).double().requires_grad_(False)
    made = tucker_layers(old, 4, 6)
    into, core, out = tucker2(old.weight, 4, 6)
    made.load_state_dict({"0.weight": into.T[..., None, None], "1.weight": core, "2.weight": out[..., None, None],
                          **({} if old.bias is None else {"2.bias": old.bias})})  # fmt: skip
    x = _random(2, 4, 9, 9)
    torch.testing.assert_close(made(x), old(x))


@pytest.fixture(scope="module")
def cnn() -> Source:
    return open_source(resolve("mnistcnn"))


def _context(source: Source) -> Context:
    return Context(source, Calibration(samples=2), 0, lambda line: None)


def test_step_saves_and_the_folder_opens(cnn: Source, tmp_path: Path) -> None:
    """The model must get smaller by what the report says, and come back from its folder."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "tucker"\nkeep = 0.6\n')
    report = compress_job(dataclasses.asdict(cnn.ref), str(recipe), str(tmp_path / "out"), evaluate=False)
    rows = report["steps"][0]["layers"]
    saved = sum(row["parameters_before"] - row["parameters_after"] for row in rows)
    assert saved > 0 and report["after"]["parameters"] == report["before"]["parameters"] - saved
    assert all(0.5 < row["energy"] < 1 and row["parameters_after"] <= 0.6 * row["parameters_before"] for row in rows)
    direct, _ = apply(cnn, Tucker(step="tucker", keep=0.6), _context(cnn))
    again = open_source(resolve(str(tmp_path / "out")))
    sample = next(iter(cnn.samples()))
    torch.testing.assert_close(again.module(**sample), direct.module(**sample))


def test_weighted_rows_come_out_better() -> None:
    """Rows that count more must be nearer to the table than with equal counts, and full rank must lose nothing."""
    table, counts = _random(50, 8), torch.ones(50, dtype=torch.float64)
    rows, weight, _ = weighted_factors(table, counts, 8)
    torch.testing.assert_close(rows @ weight.T, table)
    heavy = counts.clone()
    heavy[:5] = 1000.0
    errors = []
    for given in (counts, heavy):
        rows, weight, _ = weighted_factors(table, given, 4)
        errors.append((rows @ weight.T - table)[:5].square().sum())
    assert errors[1] < 0.5 * errors[0]


def test_embedding_step(tmp_path: Path) -> None:
    """A table must become a thinner one and a linear layer, near the original, in a folder that opens; ties stay."""
    lstm = open_source(resolve("charlstm"))
    context = _context(lstm)
    settings = LowRankEmbedding(step="low-rank-embedding", keep=0.5)
    made, report = embedding.apply(lstm, settings, context)
    (row,) = report["layers"]
    pair, old = made.module.get_submodule(row["layer"]), lstm.module.get_submodule(row["layer"])
    assert [type(m) for m in pair] == [nn.Embedding, nn.Linear] and row["parameters_after"] <= old.weight.numel() / 2
    again, _ = embedding.apply(lstm, settings, context)
    assert torch.equal(again.module.get_submodule(row["layer"])[0].weight, pair[0].weight)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "low-rank-embedding"\nkeep = 0.5\n')
    compress_job(dataclasses.asdict(lstm.ref), str(recipe), str(tmp_path / "out"), evaluate=False)
    assert open_source(resolve(str(tmp_path / "out"))).edits == made.edits


def test_tied_tables_stay(tiny: Source, context: Context) -> None:
    """A table that is also the head's weight must be left alone, with the reason."""
    same, report = embedding.apply(tiny, LowRankEmbedding(step="low-rank-embedding", rank=2), context)
    assert not same.edits and "shared with head.weight" in report["skipped"][0]["reason"]


def test_wrong_input_is_named(cnn: Source, tiny: Source, context: Context) -> None:
    """Models without such layers, patterns without a match and ranks that no layer has must each be told."""
    with pytest.raises(UsageProblem, match="must find convolutions"):
        apply(tiny, Tucker(step="tucker", keep=0.5), context)
    with pytest.raises(UsageProblem, match=r"must find nn\.Embedding"):
        embedding.apply(cnn, LowRankEmbedding(step="low-rank-embedding", rank=2), _context(cnn))
    with pytest.raises(UsageProblem, match="must match layers"):
        apply(cnn, Tucker(step="tucker", keep=0.5, include=("encoder.*",)), _context(cnn))
    with pytest.raises(UsageProblem, match="none has more than 11"):
        embedding.apply(tiny, LowRankEmbedding(step="low-rank-embedding", rank=12), context)
    for old, ranks in ((nn.Conv2d(4, 6, 3), (5, 6)), (nn.Linear(2, 2), (1, 1))):
        with pytest.raises(ValueError, match="must be"):
            tucker_layers(old, *ranks)
    for table, rank in ((nn.Embedding(5, 4), 5), (nn.Linear(2, 2), 1)):
        with pytest.raises(ValueError, match="must be"):
            embedding_pair(table, rank)

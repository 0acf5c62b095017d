"""Steps that replace attention: torch's fused modules opened, blocks and windows; the folder and its ONNX graph."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from deploytool.compress.attention import routed
from deploytool.compress.attention.plain import apply
from deploytool.compress.attention.tables import BlockwiseAttention, LocalAttention, PlainAttention
from deploytool.compress.prune.magnitude import apply as prune
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.run import compress_job
from deploytool.compress.step import Calibration, Context
from deploytool.errors import UsageProblem
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.lower.onnx import lower_onnx
from deploytool.source import Source

FUSED = """
import torch
from torch import nn

INPUTS = {"x": ("batch", "tokens", 12)}


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(12, 3, 40, batch_first=True)
        return nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(12, 4))


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(*size, 12, generator=generator)} for size in ((2, 5), (3, 7), (1, 4))]
"""
RECIPE = """
[[compress]]
step = "plain-attention"
[[compress]]
step = "svd"
keep = 0.6
whiten = true
include = ["*.q", "*.linear1"]
"""


@pytest.fixture
def fused(tmp_path: Path) -> Source:
    path = tmp_path / "fused.py"
    path.write_text(FUSED.replace('"x"', '"input"'))
    return open_source(resolve(str(path)))


def test_outputs_stay(fused: Source, context: Context) -> None:
    """The step must replace the outermost fused module, say how near it came, and keep the outputs."""
    changed, report = apply(fused, PlainAttention(step="plain-attention"), context)
    assert [(row["layer"], row["kind"]) for row in report["layers"]] == [("0", "TransformerEncoder")]
    assert 0 <= report["layers"][0]["difference"] < 1e-5
    for sample in fused.samples():
        torch.testing.assert_close(changed.module(**sample), fused.module(**sample), atol=1e-5, rtol=1e-5)


def test_zeros_of_projections_stay_known(fused: Source, context: Context) -> None:
    """Masks of the fused projections must go over to the plain ones, so that training keeps their zeros."""
    pruned, _ = prune(fused, Magnitude(step="magnitude", sparsity=0.5), context)
    changed, _ = apply(pruned, PlainAttention(step="plain-attention"), context)
    weights = {n: p for n, p in changed.module.named_parameters() if n.endswith("weight") and p.ndim == 2}
    assert set(changed.masks) == set(weights) and "0.layers.1.self_attn.k.weight" in weights
    assert all(torch.equal(changed.masks[name], weight != 0) for name, weight in weights.items())


def test_later_steps_reach_the_projections_and_the_folder_opens(fused: Source, tmp_path: Path) -> None:
    """After the step svd must factor a projection, and the written folder must give the same outputs again."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    report = compress_job(dataclasses.asdict(fused.ref), str(recipe), str(tmp_path / "out"))
    assert [row["layer"] for row in report["steps"][1]["layers"]] == [
        "0.layers.0.self_attn.q", "0.layers.0.linear1", "0.layers.1.self_attn.q", "0.layers.1.linear1",
    ]  # fmt: skip
    again = open_source(resolve(str(tmp_path / "out")))
    assert [edit["kind"] for edit in again.edits] == ["plain_attention", *["linear_pair"] * 4]
    assert all(torch.isfinite(again.module(**sample)).all() for sample in again.samples())


def test_a_model_without_them_is_told(tiny: Source, context: Context) -> None:
    """Nothing to replace must be an error, not a step that did nothing."""
    with pytest.raises(UsageProblem, match=r"must find nn\.MultiheadAttention"):
        apply(tiny, PlainAttention(step="plain-attention"), context)


ROUTED = [BlockwiseAttention(step="blockwise-attention", block=3),
          LocalAttention(step="local-attention", window=2, stride=2, global_tokens=1)]  # fmt: skip


@pytest.mark.parametrize("settings", ROUTED, ids=["blocks", "sparse"])
def test_routed_attention_exports(
    settings: BlockwiseAttention | LocalAttention, fused: Source, context: Context, tmp_path: Path
) -> None:  # fmt: skip
    """Blocks and windows must come out of the ONNX graph right at lengths that the trace has not seen."""
    runtime = pytest.importorskip("onnxruntime")
    opened, _ = apply(fused, PlainAttention(step="plain-attention"), context)
    changed, report = routed.apply(opened, settings, context)
    assert [row["layer"] for row in report["layers"]] == ["0.layers.0.self_attn", "0.layers.1.self_attn"]
    session = runtime.InferenceSession(lower_onnx(changed, tmp_path / "out").main_file)
    for batch, tokens in ((2, 5), (3, 7), (1, 1), (4, 19)):
        x = torch.randn(batch, tokens, 12, generator=torch.Generator().manual_seed(tokens))
        (got,) = session.run(None, {"input": x.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), changed.module(x), atol=1e-5, rtol=1e-5)


def test_a_routed_folder_opens(tmp_path: Path) -> None:
    """A recipe with a window must write a folder whose module has the window, and not elsewhere, again."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "local-attention"\nwindow = 2\nexclude = ["blocks.0.*"]\n')
    digits = open_source(resolve("digits"))
    report = compress_job(dataclasses.asdict(digits.ref), str(recipe), str(tmp_path / "out"), evaluate=False)
    assert [row["reason"] for row in report["steps"][0]["skipped"]] == ["not chosen by include and exclude"]
    again = open_source(resolve(str(tmp_path / "out")))
    assert [e["pattern"]["window"] for e in again.edits] == [2, 2, 2]
    sample = next(iter(digits.samples()))
    here, _ = routed.apply(digits, LocalAttention(step="local-attention", window=2, exclude=("blocks.0.*",)),
                           Context(digits, Calibration(), 0, lambda line: None))  # fmt: skip
    torch.testing.assert_close(again.module(**sample), here.module(**sample))
    assert (again.module(**sample)["logits"] - digits.module(**sample)["logits"]).abs().max() > 0.01


def test_a_model_that_asks_for_no_attention_is_told(tiny: Source, fused: Source, context: Context) -> None:
    """Models without attention, or with torch's fused one, must be refused with what to do."""
    for source in (tiny, fused):
        with pytest.raises(UsageProblem, match="must find modules that call scaled_dot_product_attention") as caught:
            routed.apply(source, ROUTED[0], context)
        assert "plain-attention" in str(caught.value.fix)

"""What inspect tells of layers: ranks, heads, bits, stored bytes, zeros and ties."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from deploytool.encoding import Encoding
from deploytool.load import describe
from deploytool.load.describe import describe_job, layers
from deploytool.load.grid import snap
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import apply_edits, with_module
from deploytool.source import Source

MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.up, self.down = nn.Linear(12, 64), nn.Linear(64, 12)

    def forward(self, x):
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.down(self.up(x))


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model()


def samples():
    return [{"x": torch.ones(2, n, 12)} for n in (4, 5)]
"""


@pytest.fixture
def source(tmp_path: Path) -> Source:
    (tmp_path / "model.py").write_text(MODEL)
    return open_source(resolve(str(tmp_path / "model.py")))


def test_every_layer_tells_its_form(source: Source) -> None:
    """Ranks of factors, heads of fused and of plain attention, bits and bytes of grids, and zeros must be told."""
    fused = {row["name"]: row for row in layers(source)}
    assert fused["attention"]["heads"] == 3 and fused["up"]["heads"] is None and fused["up"]["bits"] == 32
    edits = ({"kind": "plain_attention", "layer": "attention"}, {"kind": "linear_pair", "layer": "down", "rank": 5})
    module = source.module
    apply_edits(module, edits)
    module.down.load_state_dict({name: torch.zeros_like(t) for name, t in module.down.state_dict().items()})
    encoding = Encoding(4, 0, 12, torch.full((64, 1), 0.1), torch.full((64, 1), 8.0))
    module.up.weight = nn.Parameter(snap(module.up.weight, encoding), requires_grad=False)
    changed = with_module(source, module, edits=edits, encodings={"up.weight": encoding})
    rows = {row["name"]: row for row in layers(changed)}
    assert (rows["attention"]["heads"], rows["attention"]["parameters"]) == (3, 0) and rows["attention.q"]["bits"] == 32
    assert [rows[name]["rank"] for name in ("down.0", "down.1", "up")] == [5, 5, None]
    assert rows["down.0"]["sparsity"] == 1.0 and rows["down.0"]["size_bytes"] == 5 * 64 * 4
    assert rows["up"]["bits"] == 4 and rows["up"]["size_bytes"] == 64 * 12 // 2 + 2 * 64 * 4 + 64 * 4


def test_the_total_counts_codes_as_they_are_stored(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized weight must count in the model's bytes as it does in its layer's."""
    encoding = Encoding(4, 0, 12, torch.full((64, 1), 0.1), torch.full((64, 1), 8.0))
    source.module.up.weight.data = snap(source.module.up.weight, encoding)
    coded = dataclasses.replace(source, encodings={"up.weight": encoding})
    monkeypatch.setattr(describe, "open_source", lambda ref: coded)
    told = describe_job(dataclasses.asdict(source.ref))
    assert told["size_bytes"] == sum(row["size_bytes"] for row in told["layers"]) < 4 * told["parameters"]


def test_the_job_tells_of_a_shipped_model() -> None:
    """The digits model must show its four attentions of eight heads each, and every row the same keys."""
    told = describe_job(dataclasses.asdict(resolve("digits")))
    heads = {row["name"]: row["heads"] for row in told["layers"] if row["heads"]}
    assert heads == {f"blocks.{i}.attention": 8 for i in range(4)}
    assert len({tuple(sorted(row)) for row in told["layers"]}) == 1
    assert told["parameters"] == sum(row["parameters"] for row in told["layers"])

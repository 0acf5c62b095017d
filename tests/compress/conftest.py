"""A tiny language model in a model file: small enough to train in a second, with a tied head and a norm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from deploytool.compress.step import Calibration, Context
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import ModelRef, Source

TINY = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

INPUTS = {"ids": ("batch", "sequence")}


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.norm = nn.LayerNorm(12)
        self.up = nn.Linear(12, 40)
        self.down = nn.Linear(40, 12)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        hidden = self.embed(ids)
        hidden = hidden + self.drop(self.down(torch.relu(self.up(self.norm(hidden)))))
        return {"logits": self.head(hidden), "hidden": hidden}


def build():
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return Tiny()


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"ids": torch.randint(0, 11, size, generator=generator)} for size in ((1, 5), (2, 7), (3, 4))]


def train_batches():
    generator = torch.Generator().manual_seed(2)
    for _ in range(4):
        ids = torch.randint(0, 11, (8, 6), generator=generator)
        yield {"ids": ids, "target": (ids + 1) % 11}


def loss(outputs, batch):
    return cross_entropy(outputs["logits"].flatten(0, 1), batch["target"].flatten())


def evaluate(predict):
    ids = torch.arange(11)[None]
    return {"share": (predict({"ids": ids})["logits"].argmax(-1) == ids).double().mean().item()}
"""


def _write_tiny(folder: Path, *, seed: int = 0, hooks: bool = True) -> ModelRef:
    """The tiny model's file; without `hooks` it has neither train_batches nor loss nor evaluate."""
    text = TINY.replace("SEED", str(seed))
    path = folder / "tiny.py"
    path.write_text(text if hooks else text.partition("def train_batches")[0])
    return resolve(str(path))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Barriers between two threads cost more than tiny models gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def write_tiny() -> Callable[..., ModelRef]:
    return _write_tiny


@pytest.fixture
def tiny_ref(tmp_path: Path) -> ModelRef:
    return _write_tiny(tmp_path)


@pytest.fixture
def tiny(tiny_ref: ModelRef) -> Source:
    return open_source(tiny_ref)


@pytest.fixture
def context(tiny: Source) -> Context:
    return Context(tiny, Calibration(), 0, lambda line: None)

"""A small character-level transformer: the model file of training.py, which trains it and then gives it two bits."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

INPUTS = {"tokens": ("batch", "sequence")}
LOWER_IS_BETTER = ("perplexity",)
WEIGHTS = Path(os.environ.get("TRAINING_LM_WEIGHTS", "training_lm.pt"))
ROWS = 16  # windows of 96 characters per batch
CLASSES, LENGTH = 96, 128
Feeds = dict[str, Tensor]
_SPEC = importlib.util.spec_from_file_location("charlstm", Path(__file__).parents[2] / "models" / "charlstm.py")
assert _SPEC is not None and _SPEC.loader is not None
_TEXT = importlib.util.module_from_spec(_SPEC)  # its text, its split
_SPEC.loader.exec_module(_TEXT)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Characters(nn.Module):
    def __init__(self, width: int = 64, heads: int = 4, depth: int = 1) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(CLASSES, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.embed(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x))}


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Characters()
    if WEIGHTS.is_file():
        model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return model


def samples() -> Iterable[Feeds]:
    return [{"tokens": sample["tokens"]} for sample in _TEXT.samples()]


def train_batches(epoch: int = 0) -> Iterator[Feeds]:
    order = int(torch.randint(1 << 30, (1,)))  # training seeds what is drawn here with its seed and the epoch
    for batch in _TEXT.train_batches(order):
        for start in range(0, len(batch["tokens"]), ROWS):
            yield {name: value[start : start + ROWS] for name, value in batch.items()}


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    return cross_entropy(outputs["logits"].flatten(0, 1), batch["target"].flatten())


def evaluate(predict: Callable[[Feeds], Mapping[str, Tensor]]) -> dict[str, float]:
    return {"perplexity": math.exp(_TEXT.evaluate(predict)["bits_per_char"] * math.log(2))}

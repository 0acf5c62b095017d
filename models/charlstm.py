"""A small character-level LSTM language model on the Python reference.

Text: the distinct paragraphs of `pydoc_data.topics`, of which every tenth block of 16 is held out. The text differs a
little between versions of Python. Weights: trained by scripts/train/charlstm.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from statistics import fmean

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WEIGHTS = Path(__file__).with_suffix(".safetensors")
FILES = [WEIGHTS]
INPUTS = {"tokens": ("batch", "sequence")}
LOWER_IS_BETTER = ("bits_per_char",)

Feeds = dict[str, Tensor]
BLOCK = 16  # paragraphs
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))  # index = token; anything else becomes "?"
SHAPES = ((1, 64), (1, 1), (2, 16), (4, 33), (1, 128), (8, 64), (3, 7), (16, 128))  # rows, characters of each sample


class CharacterModel(nn.Module):
    """tokens int64 [batch, sequence] -> logits [batch, sequence, 96] of each next character; the state starts at 0."""

    def __init__(self, width: int = 32, hidden: int = 192) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(CHARACTERS), width)
        self.lstm = nn.LSTM(width, hidden, batch_first=True)
        self.head = nn.Linear(hidden, len(CHARACTERS))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        states, _ = self.lstm(self.embedding(tokens))
        return {"logits": self.head(states)}


def build() -> nn.Module:
    """The trained model, in eval mode."""
    model = CharacterModel()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def _text() -> tuple[Tensor, Tensor]:
    """Tokens of the training part (about 330,000 characters) and of the held-out part (about 40,000).

    Topics repeat one another: each paragraph is taken once, and none is held out whose words were trained on.
    """
    paragraphs = list(dict.fromkeys(p for name in sorted(topics) for p in topics[name].split("\n\n")))
    blocks = [paragraphs[start : start + BLOCK] for start in range(0, len(paragraphs), BLOCK)]
    train = [p for index, block in enumerate(blocks) if index % 10 != 9 for p in block]
    words = " ".join(" ".join(train).split())
    test = [p for block in blocks[9::10] for p in block if " ".join(p.split()) not in words]
    return _tokens("\n\n".join(train)), _tokens("\n\n".join(test))


def _tokens(text: str) -> Tensor:
    """int64 [characters]."""
    token = {character: index for index, character in enumerate(CHARACTERS)}
    return torch.tensor([token.get(character, token["?"]) for character in text])


def samples() -> Iterable[Feeds]:
    """Consecutive pieces of the held-out text."""
    sizes = [rows * length for rows, length in SHAPES]
    pieces = _text()[1][: sum(sizes)].split(sizes)
    return [{"tokens": piece.clone().view(shape)} for piece, shape in zip(pieces, SHAPES, strict=True)]


def evaluate(
    predict: Callable[[Feeds], Mapping[str, Tensor]], record: Callable[[str, Sequence[float]], None] | None = None
) -> dict[str, float]:
    """Mean bits to encode a held-out character; the scores are those of windows of 128 characters, 16 in a batch."""
    text = _text()[1]
    windows = text[: len(text) // 2048 * 2048].view(-1, 128)
    bits = [
        cross_entropy(
            predict({"tokens": rows[:, :-1].contiguous()})["logits"].transpose(1, 2), rows[:, 1:], reduction="none"
        ).mean(dim=1)
        / math.log(2)
        for rows in windows.split(16)
    ]
    scores = torch.cat(bits).tolist()
    if record:
        record("bits_per_char", scores)
    return {"bits_per_char": fmean(scores)}


def train_batches(epoch: int = 0) -> Iterator[Feeds]:
    """One pass over the training text in batches of 64 windows of 96 characters; `epoch` seeds order and offset."""
    generator = torch.Generator().manual_seed(epoch)
    text = _text()[0][int(torch.randint(96, (1,), generator=generator)) :]
    count = (len(text) - 1) // 96
    inputs, targets = text[: count * 96].view(count, 96), text[1 : count * 96 + 1].view(count, 96)
    for picked in torch.randperm(count, generator=generator).split(64):
        yield {"tokens": inputs[picked], "target": targets[picked]}


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the next character, in nats."""
    return cross_entropy(outputs["logits"].transpose(1, 2), batch["target"])

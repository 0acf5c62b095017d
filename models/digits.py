"""A small vision transformer on scikit-learn's handwritten digits.

Data: the 1,797 real 8x8 scans that scikit-learn carries (UCI "optical recognition of handwritten digits"), split once,
stratified, into 1,347 for training and 450 for evaluation. Weights: trained by scripts/train/digits.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

WEIGHTS = Path(__file__).with_suffix(".safetensors")
FILES = [WEIGHTS]
INPUTS = {"image": ("batch", 1, 8, 8)}

Feeds = dict[str, Tensor]
BATCHES = (1, 2, 3, 4, 5, 8, 16, 32, 1, 7)  # images per sample; evaluation stays within the largest


class Attention(nn.Module):
    """Self-attention of plain linears: [batch, tokens, width] -> the same.

    The number of heads is read from the projections' width, so removing whole heads needs no other change.
    """

    def __init__(self, width: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(projection(x)) for projection in (self.q, self.k, self.v))
        mixed = scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        """[batch, tokens, heads * head_dim] -> [batch, heads, tokens, head_dim]."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: attention, then a two-layer network, each added to its input."""

    def __init__(self, width: int, head_dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(gelu(self.up(self.norm2(x))))


class DigitTransformer(nn.Module):
    """image [batch, 1, 8, 8] in 0..1 -> logits [batch, 10]; 16 patches of 2x2 pixels are the tokens."""

    def __init__(self, width: int = 64, head_dim: int = 8, hidden: int = 256, depth: int = 4) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, width, kernel_size=2, stride=2)
        # A patch is only four pixels: with a fainter position the model confuses places and loses 2 % accuracy.
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.5)
        self.blocks = nn.ModuleList(Block(width, head_dim, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x = self.patch(image).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(self.norm(x).mean(dim=1))}


def build() -> nn.Module:
    """The trained model, in eval mode."""
    model = DigitTransformer()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def _split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, test images, train labels, test labels; pixels (0..16 in the source) are scaled to 0..1."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError(
            "The digits model needs the package scikit-learn for its data: pip install 'deploytool[zoo]'"
        ) from error
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
    labels = torch.tensor(digits.target, dtype=torch.int64)
    train, test = train_test_split(range(len(labels)), test_size=450, stratify=digits.target, random_state=0)
    return images[train], images[test], labels[train], labels[test]


def samples() -> Iterable[Feeds]:
    """Held-out digits in batches of different sizes, consecutive and without overlap."""
    images = _split()[1]
    return [{"image": part.clone()} for part in images[: sum(BATCHES)].split(list(BATCHES))]


def evaluate(
    predict: Callable[[Feeds], Mapping[str, Tensor]], record: Callable[[str, Sequence[float]], None] | None = None
) -> dict[str, float]:
    """Share of the 450 held-out digits that are named right."""
    _, images, _, labels = _split()
    guesses = [predict({"image": part})["logits"].argmax(dim=1) for part in images.split(max(BATCHES))]
    right = (torch.cat(guesses) == labels).double()
    if record:
        record("accuracy", right.tolist())
    return {"accuracy": right.mean().item()}


def train_batches(epoch: int = 0) -> Iterator[Feeds]:
    """One pass over the training part in batches of 64; `epoch` seeds the order."""
    images, _, labels, _ = _split()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch))
    for picked in order.split(64):
        yield {"image": images[picked], "target": labels[picked]}


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of the ten classes, in nats per image."""
    return cross_entropy(outputs["logits"], batch["target"])

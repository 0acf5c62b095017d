"""Convolutions over a picture of one channel, pooled, with a linear behind."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 1, 12, 12)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    ).eval()  # fmt: skip


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 1, 12, 12, generator=generator)} for batch in (1, 2, 4)]

"""Convolution, batch norm, ReLU, and no linear layer at all."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 3, 12, 12)}


def build() -> nn.Module:
    torch.manual_seed(0)
    stages = (nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AvgPool2d(5))
    return nn.Sequential(*stages).eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 3, 12, 12, generator=generator)} for batch in (1, 2, 4)]

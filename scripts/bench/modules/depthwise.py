"""Depthwise and pointwise convolutions with batch norms; batch, height and width are free."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 3, "height", "width")}


def block(inputs: int, outputs: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False), nn.BatchNorm2d(inputs),
                         nn.ReLU6(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU6(),
                         )  # fmt: skip


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), block(16, 32, 1), block(32, 32, 2), nn.AdaptiveAvgPool2d(1),
                         nn.Flatten(), nn.Linear(32, 10))  # fmt: skip


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    sizes = ((1, 32, 32), (2, 48, 40), (3, 40, 64))
    return [{"input": torch.randn(batch, 3, high, wide, generator=random)} for batch, high, wide in sizes]

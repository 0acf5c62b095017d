"""Transposed convolutions from a vector to an image; the batch is free."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 16, 4, 4)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.ConvTranspose2d(16, 16, 4, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.ConvTranspose2d(16, 8, 3, 2, 1, output_padding=1, groups=2), nn.LeakyReLU(0.1),
                         nn.ConvTranspose2d(8, 3, 2, 2), nn.Tanh())  # fmt: skip


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [{"input": torch.randn(batch, 16, 4, 4, generator=random)} for batch in (1, 2, 4)]

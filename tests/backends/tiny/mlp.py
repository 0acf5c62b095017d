"""Three linears: what every int8 backend can take."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 24)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 6)).eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 24, generator=generator)} for batch in (1, 3, 5)]

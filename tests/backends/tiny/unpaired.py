"""Two linears: one of whose weights every second is 0, so that no two neighbours add up, and one of full rows."""

import torch
from torch import Tensor, nn

INPUTS = {"input": ("batch", 24)}


def build() -> nn.Module:
    torch.manual_seed(0)
    sparse, full = nn.Linear(24, 32), nn.Linear(32, 8)
    sparse.weight.data[:, 1::2] = 0
    return nn.Sequential(sparse, nn.ReLU(), full).eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 24, generator=generator)} for batch in (1, 3, 5)]

"""A GRU whose state goes in and comes out; batch and length are free."""

import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", "length", 12), "state": (1, "batch", 24)}


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(12, 24, batch_first=True)

    def forward(self, x: Tensor, state: Tensor) -> dict[str, Tensor]:
        y, state = self.gru(x, state)
        return {"y": y, "state_out": state}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Step()


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    sizes = ((1, 9), (2, 7), (3, 12))
    return [
        {"x": torch.randn(batch, length, 12, generator=random), "state": torch.randn(1, batch, 24, generator=random)}
        for batch, length in sizes
    ]

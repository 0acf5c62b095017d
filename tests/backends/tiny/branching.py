"""Decides by values: one of two layers, and how often another is applied; what is around it can be traced."""

import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", 16)}


class Chooser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.warm, self.cold = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cold(x)
        if bool(x.sum() > 0):
            y = self.warm(x)
        for _ in range(int(x[0, 0].abs() * 4) + 1):
            y = torch.tanh(y + x)
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.chooser, self.head = Chooser(), nn.Linear(16, 8)

    def forward(self, x, **others):  # no script: TorchScript has no such arguments
        hidden = self.chooser(x)
        return {"scores": self.head(hidden), "hidden": hidden}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(batch, 16, generator=generator)} for batch in (1, 2, 3, 4, 5, 6)]

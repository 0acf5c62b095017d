"""An LSTM over both directions, two layers deep; batch and length are free."""

import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", "length", 12)}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(12, 24, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(48, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"tags": self.head(self.lstm(x)[0])}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tagger()


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(batch, length, 12, generator=random)} for batch, length in ((1, 9), (2, 7), (3, 12))]

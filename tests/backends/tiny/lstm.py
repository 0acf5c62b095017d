"""An LSTM and a linear head over every step."""

import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", "steps", 16)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.head(self.lstm(x)[0])}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(*shape, 16, generator=generator)} for shape in ((1, 9), (2, 5), (3, 7))]

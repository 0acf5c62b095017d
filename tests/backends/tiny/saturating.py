"""A linear whose exact answer is 63 and whose 8-bit products overflow 16-bit sums: ones times ones, with one 0."""

import torch
from torch import Tensor, nn

INPUTS = {"x": ("batch", 64)}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8, bias=False)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"sum": self.linear(x)}


def build() -> nn.Module:
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    feeds = [{"x": torch.ones(batch, 64)} for batch in (1, 2)]
    for feed in feeds:
        feed["x"][:, 0] = 0
    return feeds

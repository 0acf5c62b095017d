"""Traps of dynamic quantization: an nn.TransformerEncoderLayer, a weight read as a tensor, shared and tied weights."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

INPUTS = {"tokens": ("batch", "length")}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.twice = nn.Linear(32, 32)
        self.again = self.twice
        self.read = nn.Linear(32, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.layer(self.embedding(tokens))
        x = linear(self.again(torch.tanh(self.twice(x))), self.read.weight)
        return {"logits": self.head(self.gru(x)[0])}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(40, shape, generator=generator)} for shape in ((1, 8), (2, 6), (3, 11))]

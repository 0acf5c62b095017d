"""Attention whose tokens are all of the one kind that there is: a lookup in a table of one row, by sizes alone."""

import torch
from torch import Tensor, nn

INPUTS = {"tokens": ("batch", "length")}
WIDTH, HEADS = 32, 4


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds = nn.Embedding(50, WIDTH), nn.Embedding(1, WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, tokens: Tensor) -> dict[str, Tensor]:
        x = self.words(tokens) + self.kinds(torch.zeros_like(tokens))
        q, k, v = (layer(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax((q * (WIDTH // HEADS) ** -0.5) @ k.transpose(2, 3), dim=-1)
        return {"hidden": x + self.out((weights @ v).transpose(1, 2).flatten(2))}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [{"tokens": torch.randint(50, size, generator=generator)} for size in ((1, 8), (2, 6), (3, 11))]

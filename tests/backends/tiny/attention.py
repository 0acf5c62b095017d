"""Two transformer blocks of plain linears with a mask, and two outputs; one linear is used under two names."""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

INPUTS = {"tokens": ("batch", "length"), "mask": ("batch", "length")}
WIDTH, HEADS = 32, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (layer(y).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        x = x + self.out(scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.first = nn.Linear(WIDTH, WIDTH)
        self.again = self.first

    def forward(self, tokens: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embedding(tokens)
        bias = torch.where(mask > 0, 0.0, torch.finfo(torch.float32).min)[:, None, None, :]
        for block in self.blocks:
            x = block(x, bias)
        hidden = self.again(torch.tanh(self.first(x)))
        return {"hidden": hidden, "pooled": hidden.mean(dim=1)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


def samples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    feeds = []
    for batch, length in ((1, 8), (2, 6), (3, 11)):
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[-1, length - batch + 1 :] = 0
        feeds.append({"tokens": torch.randint(50, (batch, length), generator=generator), "mask": mask})
    return feeds

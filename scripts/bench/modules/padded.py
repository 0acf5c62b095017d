"""torch's own nn.TransformerEncoder over padded batches; batch and length are free, and every position is an output."""

import torch
from torch import Tensor, nn

INPUTS = {"ids": ("batch", "length"), "hidden": ("batch", "length")}


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.tags = nn.Linear(32, 5)

    def forward(self, ids: Tensor, hidden: Tensor) -> dict[str, Tensor]:
        return {"tags": self.tags(self.layers(self.words(ids), src_key_padding_mask=hidden))}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Tagger()


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    lengths = ((9,), (7, 5), (12, 3, 8))
    return [
        {"ids": torch.randint(64, (len(rows), max(rows)), generator=random),
         "hidden": torch.arange(max(rows)) >= torch.tensor(rows)[:, None]}
        for rows in lengths
    ]  # fmt: skip

"""torch's own nn.Transformer, encoder and decoder; batch and both lengths are free."""

import torch
from torch import Tensor, nn

INPUTS = {"source": ("batch", "read", 32), "target": ("batch", "written", 32)}


class Translator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Transformer(32, 4, 2, 2, 64, batch_first=True)

    def forward(self, source: Tensor, target: Tensor) -> dict[str, Tensor]:
        hidden = torch.full((target.shape[1], target.shape[1]), float("-inf")).triu(1)
        return {"y": self.layers(source, target, tgt_mask=hidden)}


def build() -> nn.Module:
    torch.manual_seed(0)
    return Translator()


def samples() -> list[dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    sizes = ((1, 9, 5), (2, 7, 4), (3, 12, 8))
    return [
        {"source": torch.randn(batch, read, 32, generator=random),
         "target": torch.randn(batch, written, 32, generator=random)}
        for batch, read, written in sizes
    ]  # fmt: skip

"""Small models of many kinds and sizes, drawn from a seed: what faults.py plants faults in, and finds none in.

A model file like any other; faults.py writes copies of it with other values of KIND and SEED.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

KIND = "transformer"
SEED = 0
KINDS = ("mlp", "residual", "cnn", "separable", "transformer", "decoder", "recurrent", "mixer")
VOCABULARY = 97
_draw = random.Random(f"{KIND} {SEED}")
WIDTH = _draw.choice((16, 24, 32, 48))
DEPTH = _draw.choice((1, 2, 3))
CLASSES = _draw.choice((3, 5, 10))
TOKENS = KIND in ("transformer", "decoder", "recurrent")
IMAGES = KIND in ("cnn", "separable")
INPUTS = (
    {"ids": ("batch", "length"), "mask": ("batch", "length")} if TOKENS
    else {"input": ("batch", 3, 12, 12)} if IMAGES
    else {"x": ("batch", 8, WIDTH)} if KIND == "mixer" else {"input": ("batch", WIDTH)}
)  # fmt: skip
ACTIVATION: type[nn.Module] = _draw.choice((nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.LeakyReLU))


class Residual(nn.Module):
    """x + f(norm(x)) over the last axis."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.act, self.down = nn.Linear(width, 2 * width), ACTIVATION(), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.act(self.up(self.norm(x))))


class Attention(nn.Module):
    """Multi-head attention written out, with a mask over keys, causal where asked."""

    def __init__(self, width: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = 4, causal
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (part(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + bias
        if self.causal:
            scores = scores + torch.full((x.shape[1], x.shape[1]), -1e9).triu(1)
        return x + self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).flatten(2))


class Tokens(nn.Module):
    """ids and mask [batch, length] -> logits [batch, classes], or per token for decoders."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        if KIND == "recurrent":
            layer = _draw.choice((nn.LSTM, nn.GRU))
            self.body: nn.Module = layer(WIDTH, WIDTH, batch_first=True)
        else:
            self.attentions = nn.ModuleList(Attention(WIDTH, KIND == "decoder") for _ in range(DEPTH))
            self.feeds = nn.ModuleList(Residual(WIDTH) for _ in range(DEPTH))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY if KIND == "decoder" else CLASSES)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.embed(ids)
        if KIND == "recurrent":
            x = self.body(x)[0]
        else:
            bias = (1.0 - mask.to(x.dtype))[:, None, None] * -1e4
            for attention, feed in zip(self.attentions, self.feeds, strict=True):
                x = feed(attention(x, bias))
        x = self.norm(x)
        if KIND == "decoder":
            return {"logits": self.head(x)}
        kept = mask.to(x.dtype).unsqueeze(-1)
        return {"logits": self.head((x * kept).sum(1) / kept.sum(1))}


class Mixer(nn.Module):
    """[batch, 8, width]: layers across tokens and across channels in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.across = nn.ModuleList(Residual(8) for _ in range(DEPTH))
        self.along = nn.ModuleList(Residual(WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for across, along in zip(self.across, self.along, strict=True):
            x = along(across(x.transpose(1, 2)).transpose(1, 2))
        return {"features": x, "pooled": functional.normalize(x.mean(1), dim=-1)}


def _cnn() -> nn.Module:
    layers: list[nn.Module] = []
    before = 3
    for index in range(DEPTH):
        after = WIDTH // 2 * (index + 1)
        if KIND == "separable" and index:
            layers += [nn.Conv2d(before, before, 3, padding=1, groups=before), nn.Conv2d(before, after, 1)]
        else:
            layers += [nn.Conv2d(before, after, 3, padding=1)]
        layers += [nn.BatchNorm2d(after), ACTIVATION()]
        before = after
    return nn.Sequential(
        *layers, nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(before * 4, CLASSES)
    )


def build() -> nn.Module:
    """The model in eval mode; statistics of batch norms as after training."""
    torch.manual_seed(SEED)
    if KIND == "mlp":
        hidden = [part for _ in range(DEPTH) for part in (nn.Linear(WIDTH, WIDTH), ACTIVATION())]
        model: nn.Module = nn.Sequential(*hidden, nn.Linear(WIDTH, CLASSES), nn.Softmax(-1))
    elif KIND == "residual":
        model = nn.Sequential(*(Residual(WIDTH) for _ in range(DEPTH)), nn.Linear(WIDTH, CLASSES))
    else:
        model = Tokens() if TOKENS else _cnn() if IMAGES else Mixer()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.randn(module.num_features) * 0.1
            module.running_var = torch.rand(module.num_features) + 0.5
    return model.eval()


def samples() -> Iterable[dict[str, Tensor]]:
    """Batches of different sizes; token models with padding on the right."""
    generator = torch.Generator().manual_seed(SEED + 1)
    found = []
    for batch, length in ((1, 7), (2, 5), (3, 12), (5, 9), (8, 16)):
        if TOKENS:
            lengths = torch.randint(2, length + 1, (batch, 1), generator=generator)
            lengths[0] = length
            mask = (torch.arange(length)[None] < lengths).long()
            found.append({"ids": torch.randint(VOCABULARY, (batch, length), generator=generator), "mask": mask})
        else:
            name, shape = next(iter(INPUTS.items()))
            found.append({name: torch.randn(batch, *shape[1:], generator=generator)})
    return found

"""Fourier mixing in the place of attention, written as products with matrices: every runtime has these, few have DFT.

Source: Lee-Thorp, Ainslie, Eckstein, Ontanon, "FNet: mixing tokens with Fourier transforms", NAACL 2022, equation 3.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def dft(size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Cosines and sines [size, size] of 2 pi j k / size over sqrt(size): F = C - i S is the unitary DFT."""
    at = torch.arange(size)
    angles = ((at[:, None] * at) % size).to(dtype) * (2.0 * math.pi / size)
    root = size**0.5
    return angles.cos() / root, angles.sin() / root


class FourierMixing(nn.Module):
    """gain * Re(F_tokens X F_width) of X [..., tokens, width]: no weights but one gain for each channel.

    tokens    the length that every input has; None: the matrices are made for each input's own length
    keyword   the name under which X is given where it is not the first argument
    outputs   how many values the attention before returned, of which X was the first; 0: X alone. The others are None

    Other arguments are taken and ignored, masks among them: hidden tokens are mixed in, as in the paper.
    """

    width_cos: Tensor
    width_sin: Tensor
    tokens_cos: Tensor
    tokens_sin: Tensor

    def __init__(self, width: int, tokens: int | None, keyword: str | None, outputs: int):
        super().__init__()
        self.keyword, self.outputs, self.fixed = keyword, outputs, tokens is not None
        self.gain = nn.Parameter(torch.ones(width))
        for name, table in zip(("width_cos", "width_sin"), dft(width, torch.float64), strict=True):
            self.register_buffer(name, table.float(), persistent=False)
        if tokens is not None:
            for name, table in zip(("tokens_cos", "tokens_sin"), dft(tokens, torch.float64), strict=True):
                self.register_buffer(name, table.float(), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Tensor = args[0] if self.keyword is None else kwargs[self.keyword]
        cos, sin = (self.tokens_cos, self.tokens_sin) if self.fixed else dft(x.shape[-2])
        mixed = (cos @ (x @ self.width_cos) - sin @ (x @ self.width_sin)) * self.gain
        return (mixed, *[None] * (self.outputs - 1)) if self.outputs else mixed

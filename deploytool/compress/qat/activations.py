"""The range of a layer's input while the model is trained: learned, or the moving average of what was seen.

Learned: s = s_0 exp(theta) and a whole zero point that is learned straight through (Bhalgat et al., "LSQ+", CVPR
workshops 2020, equations 3 to 5). Average: min and max with momentum 0.1 (Jacob et al., "Quantization and training of
neural networks for efficient integer-arithmetic-only inference", CVPR 2018, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deploytool.compress.qat.weights import fake_quantize
from deploytool.compress.quantize.ranges import grid_between
from deploytool.load.input_grid import CHILD, InputGrid

_MOMENTUM = 0.1


class LearnedInput(nn.Module):
    """x [...] -> x on a grid whose scale and zero point are parameters, from the extremes of calibration.

    On a symmetric grid 0 stays the middle code.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int, low: Tensor, high: Tensor, symmetric: bool = False):
        super().__init__()
        self._bits = bits
        scale, zero = grid_between(low, high, bits, symmetric)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero)
        self.theta = nn.Parameter(torch.zeros(1))  # one axis: what is sharded must have one
        # Of the zero point, in shares of all codes.
        self.shift = None if symmetric else nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return fake_quantize(x, *self.grid(), self._bits)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and whole zero point."""
        scale = self.scale * self.theta[0].exp()
        if self.shift is None:
            return scale, self.zero_point
        moved = (self.zero_point + self.shift[0] * 2**self._bits).clamp(0, 2**self._bits - 1)
        return scale, moved.detach().round() + (moved - moved.detach())


class AveragedInput(nn.Module):
    """x [...] -> x on the grid between the moving averages of its extremes."""

    low: Tensor
    high: Tensor

    def __init__(self, bits: int, low: Tensor, high: Tensor, symmetric: bool = False):
        super().__init__()
        self._bits, self._symmetric = bits, symmetric
        self.register_buffer("low", low.clone())
        self.register_buffer("high", high.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.low.lerp_(x.amin().float().clamp(max=0), _MOMENTUM)
                self.high.lerp_(x.amax().float().clamp(min=0), _MOMENTUM)
        return fake_quantize(x, *self.grid(), self._bits)

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and whole zero point."""
        return grid_between(self.low, self.high, self._bits, self._symmetric)


KINDS: dict[str, type[LearnedInput | AveragedInput]] = {"learned": LearnedInput, "average": AveragedInput}


def extremes_of(x: Tensor, before: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The smallest and largest of x and of what was seen before, with 0 between them."""
    low, high = x.amin().float().clamp(max=0), x.amax().float().clamp(min=0)
    return (low, high) if before is None else (torch.minimum(low, before[0]), torch.maximum(high, before[1]))


def freeze(layer: nn.Module, bits: int) -> dict[str, float]:
    """Put the plain grid in the place of the one that was trained; its scale and zero point for the report."""
    trained = layer.get_submodule(CHILD)
    assert isinstance(trained, LearnedInput | AveragedInput)
    scale, zero = trained.grid()
    plain = InputGrid(bits)
    plain.scale.copy_(scale.detach())
    plain.zero_point.copy_(zero.detach())
    layer.add_module(CHILD, plain.eval())
    return {"input_scale": float(plain.scale), "input_zero_point": int(plain.zero_point)}

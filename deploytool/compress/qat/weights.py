"""Weights on their grids while they are trained: rounded in the forward pass, straight through in the backward one.

    q(w) = (clamp(round(w / s + z), 0, 2^b - 1) - z) s,   s = s_0 exp(theta)

The gradient of w passes where nothing is clamped; that of s is (round(x) - x) or the edge's code (Esser et al.,
"Learned step size quantization", ICLR 2020, equations 2 and 3). theta instead of s keeps scales positive.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deploytool.compress.quantize.ranges import choose
from deploytool.encoding import Encoding
from deploytool.load.grid import as_matrix, from_matrix, snap, spread
from deploytool.source import Source

_LEARNED, _FOLLOWING = "learned", "average"


def fake_quantize(matrix: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """q(w) elementwise; exactly the grid's values forward, straight through backward. All of one shape."""
    place = (matrix / scale + zero).clamp(0, 2**bits - 1)
    code = place.detach().round() + (place - place.detach())
    return (code - zero) * scale


class WeightGrid(nn.Module):
    """A parametrization: weight -> weight on the grid. `ranges` is None for scales that stay as they are."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, encoding: Encoding, ranges: str | None):
        super().__init__()
        self._like, self._ranges = encoding, ranges
        self._symmetric = encoding.symmetric
        self.register_buffer("scale", encoding.scale.clone())
        self.register_buffer("zero_point", encoding.zero_point.clone())
        self.theta = nn.Parameter(torch.zeros_like(encoding.scale)) if ranges == _LEARNED else None

    def forward(self, weight: Tensor) -> Tensor:
        matrix = as_matrix(weight, self._like.axis)
        if self._ranges == _FOLLOWING:
            with torch.no_grad():
                new = choose(matrix, self._like.bits, self._like.group, self._symmetric)
                self.scale.copy_(new.scale)
                self.zero_point.copy_(new.zero_point)
        scale = self.scale if self.theta is None else self.scale * self.theta.exp()
        scale, zero = (spread(t, matrix.shape[1], self._like.group) for t in (scale, self.zero_point))
        return from_matrix(fake_quantize(matrix, scale, zero, self._like.bits), weight.shape, self._like.axis)

    def encoding(self) -> Encoding:
        """The grid as it is now."""
        scale = self.scale if self.theta is None else self.scale * self.theta.exp()
        like = self._like
        return Encoding(like.bits, like.axis, like.group, scale.detach().clone(), self.zero_point.detach().clone())


class WeightGrids:
    """Puts parameters of a module on grids while the block runs; `bake` leaves them there for good."""

    def __init__(self, module: nn.Module, encodings: dict[str, Encoding], ranges: str | None):
        self._module = module
        self._names: dict[str, list[str]] = {}  # with the order of the owner's parameters, which stays
        for name, encoding in encodings.items():
            layer, _, parameter = name.rpartition(".")
            owner = module.get_submodule(layer)
            self._names[name] = list(owner._parameters)
            parametrize.register_parametrization(owner, parameter, WeightGrid(encoding, ranges), unsafe=True)

    def name(self, parameter: str) -> str:
        """What a parameter is called meanwhile."""
        if parameter not in self._names:
            return parameter
        layer, _, child = parameter.rpartition(".")
        return f"{layer}.parametrizations.{child}.original".lstrip(".")

    def bake(self) -> dict[str, Encoding]:
        """The parameters become plain ones that lie on their grids, which are returned by name."""
        encodings = {}
        for name, order in list(self._names.items()):
            layer, _, parameter = name.rpartition(".")
            owner = self._module.get_submodule(layer)
            parametrized = getattr(owner.parametrizations, parameter)
            encodings[name] = parametrized[0].encoding()
            value = snap(parametrized.original, encodings[name])
            parametrize.remove_parametrizations(owner, parameter, leave_parametrized=False)
            owner.register_parameter(parameter, nn.Parameter(value, requires_grad=False))
            for other in order:  # the last to be put back is last
                owner._parameters[other] = owner._parameters.pop(other)
            del self._names[name]
        return encodings

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.bake()


def on_grids(module: nn.Module, source: Source) -> WeightGrids:
    """The weights of a quantized source stay on the grids that it has, while `module`, a copy of its module, learns."""
    return WeightGrids(module, dict(source.encodings), None)

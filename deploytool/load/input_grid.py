"""A layer's input on a fixed grid: what quantization-aware training learned, kept inside the module.

Every exporter writes it as QuantizeLinear and DequantizeLinear in front of the layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

CHILD = "input_grid"


class InputGrid(nn.Module):
    """x -> (clamp(round(x / scale) + zero_point, 0, 2^bits - 1) - zero_point) * scale, one for the tensor."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, bits: int):
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.tensor(1.0))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 2**self.bits - 1)


def add_input_grid(root: nn.Module, edit: Mapping[str, Any]) -> None:
    """Put the first input of the layer that the edit names on a grid of `bits`, whose values come with the weights."""
    layer = root.get_submodule(edit["layer"])
    if hasattr(layer, CHILD):
        raise ValueError(f"layer {edit['layer']!r} has an input grid already")
    layer.add_module(CHILD, InputGrid(int(edit["bits"])).train(layer.training))
    layer.register_forward_pre_hook(_on_grid)


def _on_grid(layer: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    grid: nn.Module = layer.get_submodule(CHILD)
    return (grid(inputs[0]), *inputs[1:])

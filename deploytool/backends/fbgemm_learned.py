"""int8 layers for x86 CPUs with the scales that the model has learned: nothing is calibrated.

A layer takes floats, rounds them to its own grid, multiplies codes by codes, and gives floats: what was simulated in
training, to the last bits of fp32. A convolution is a product over its windows: fbgemm's own gives rounded results
only, for which no scale was learned.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.nn.quantized.modules.linear import LinearPackedParams
from torch.nn.functional import unfold

from deploytool.backends.linear_ranking import is_inside
from deploytool.encoding import Encoding
from deploytool.errors import InputRefused
from deploytool.load.grid import as_matrix, quantize
from deploytool.load.input_grid import CHILD, InputGrid
from deploytool.load.surgery import replace_layer
from deploytool.source import Source


class LearnedLinear(nn.Module):
    """x float [..., inputs] -> float [..., outputs]."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, grid: InputGrid, encoding: Encoding):
        super().__init__()
        self.scale, self.zero_point = float(grid.scale), int(grid.zero_point)
        weight = torch._make_per_channel_quantized_tensor(
            _codes(layer.weight, encoding), encoding.scale[:, 0].double(),
            torch.zeros(len(layer.weight), dtype=torch.int64), 0,
        )  # fmt: skip
        self.packed = LinearPackedParams(torch.qint8)
        self.packed.set_weight_bias(weight, layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32(
            x, self.scale, self.zero_point, self.packed._packed_params
        )
        return result


class LearnedConv2d(nn.Module):
    """x float [batch, channels, height, width] -> float [batch, filters, ...], as a product over unfolded windows."""

    def __init__(self, layer: nn.Conv2d, grid: InputGrid, encoding: Encoding):
        super().__init__()
        self.product = LearnedLinear(layer, grid, encoding)
        self.kernel, self.stride = layer.kernel_size, layer.stride
        self.padding, self.dilation = tuple(int(size) for size in layer.padding), layer.dilation

    def forward(self, x: Tensor) -> Tensor:
        windows = unfold(x, self.kernel, self.dilation, self.padding, self.stride)  # [batch, inputs, places]
        result = self.product(windows.transpose(1, 2)).transpose(1, 2)
        height, width = (
            (x.shape[2 + axis] + 2 * self.padding[axis] - self.dilation[axis] * (self.kernel[axis] - 1) - 1)
            // self.stride[axis] + 1 for axis in (0, 1)
        )  # fmt: skip
        image: Tensor = result.unflatten(2, (height, width))
        return image


_LAYERS: dict[type[nn.Module], Any] = {nn.Linear: LearnedLinear, nn.Conv2d: LearnedConv2d}


def has_learned(module: nn.Module) -> bool:
    """Whether the inputs of some layers lie on learned grids."""
    return any(isinstance(inner, InputGrid) for inner in module.modules())


def quantize_learned(source: Source, exclude: tuple[str, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """An int8 copy of the source's module, without what `exclude` names of source.flat, and what the artifact says.

    Layers that cannot be computed so stay as they are, grids simulated in fp32, with the reason. InputRefused DT310
    when that is every layer.
    """
    module = copy.deepcopy(source.module).eval()
    done: list[str] = []
    refused: dict[str, str] = {}
    bits = 0
    for name, layer in list(module.named_modules()):
        if not isinstance(getattr(layer, CHILD, None), InputGrid):
            continue
        encoding = source.encodings.get(f"{name}.weight".lstrip("."))
        why = "exclude names it" if is_inside(f"module.{name}".rstrip("."), exclude) else _obstacle(layer, encoding)
        if why or encoding is None:
            refused[name] = why
            continue
        replace_layer(module, name, _LAYERS[type(layer)](layer, layer.get_submodule(CHILD), encoding))
        done.append(type(layer).__name__)
        bits = max(bits, encoding.bits)
    if not done:
        raise InputRefused("DT310", "the model must hold layers whose learned grids int8 engines take (got none)",
                           detail=[f"{name}: {why}" for name, why in refused.items()][:10],
                           fix='set scheme = "static" or "dynamic", or choose an fp32 target')  # fmt: skip
    return module, {"scheme": "learned", "int8": dict(Counter(done)), "encoded": len(done),
                    "encodings_not_taken": refused, "kept_fp32": list(exclude), "weight_bits": bits}  # fmt: skip


def _obstacle(layer: nn.Module, encoding: Encoding | None) -> str:
    if type(layer) not in _LAYERS:
        return f"there are no such kernels for {type(layer).__name__}"
    if encoding is None:
        return "its weight is not on a grid"
    if encoding.scale.shape[1] > 1 or encoding.axis != 0:
        return f"int8 products have one scale per output channel (got groups of {encoding.group})"
    if not encoding.symmetric:
        return "its weight's grid is not symmetric"
    if isinstance(layer, nn.Conv2d) and layer.groups > 1:
        return "its channels are in groups"
    if isinstance(layer, nn.Conv2d) and (layer.padding_mode != "zeros" or isinstance(layer.padding, str)):
        return f"padding is {layer.padding_mode}, {layer.padding}"
    return ""


def _codes(weight: Tensor, encoding: Encoding) -> Tensor:
    """int8 [outputs, inputs], 0 for 0.0."""
    return (as_matrix(quantize(weight, encoding), 0).to(torch.int16) - encoding.levels // 2).to(torch.int8)

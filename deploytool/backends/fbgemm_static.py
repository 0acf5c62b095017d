"""Static int8 for fbgemm: a module traced by torch.fx, its ranges taken from calibration feeds.

Batch normalization and ReLU are folded into the convolution or linear before them. Weights have 7 bits per output
channel and activations 8, so the 16-bit sums of CPUs without VNNI cannot saturate (see fbgemm.py). What FX cannot
trace - control flow over values, most transformers - stays with dynamic int8.
Source: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
CVPR 2018.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.ao import quantization
from torch.ao.nn.intrinsic import quantized as fused
from torch.ao.nn.quantized import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear
from torch.ao.quantization import quantize_fx

from deploytool.backends import tables
from deploytool.errors import InputRefused

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_INT8 = (Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d, Linear, fused.ConvReLU1d,
         fused.ConvReLU2d, fused.ConvReLU3d, fused.LinearReLU)  # fmt: skip


class PercentileObserver(quantization.MinMaxObserver):
    """Range between two percentiles of each batch, widened from batch to batch: single outliers do not stretch it.

    share   of the values that may lie outside on either side, 0 to 0.5
    """

    def __init__(self, share: float = 1e-4, **settings: Any):
        super().__init__(**settings)
        self.share = share

    def forward(self, x_orig: Tensor) -> Tensor:
        """Record a batch of any shape; the values themselves are passed on unchanged."""
        super().forward(between_percentiles(x_orig, self.share))  # type: ignore[no-untyped-call]
        return x_orig


def between_percentiles(x: Tensor, share: float) -> Tensor:
    """[lowest, highest] of the values of `x` without that share of them at either end."""
    values = x.detach().flatten()
    outside = int(share * values.numel())
    low = values.kthvalue(outside + 1).values
    high = values.kthvalue(values.numel() - outside).values
    return torch.stack([low, high])


_OBSERVERS: dict[str, Any] = {
    "histogram": quantization.HistogramObserver,
    "min-max": quantization.MinMaxObserver,
    "percentile": PercentileObserver,
}


def is_mostly_convolution(module: nn.Module) -> bool:
    """Whether most layers that int8 can speed up are convolutions, and torch.fx can trace the module."""
    convolutions = sum(type(inner) in CONVOLUTIONS for inner in module.modules())
    linears = sum(type(inner) is nn.Linear for inner in module.modules())
    return convolutions > linears and not isinstance(_trace(module), str)


def quantize_static(
    module: nn.Module, feeds: Iterable[Mapping[str, Tensor]], options: tables.FbgemmBuild
) -> tuple[nn.Module, dict[str, int]]:
    """A static int8 copy of a module, and how many layers of each class became int8.

    feeds   named tensors; the ranges of activations follow from all of them. Raises InputRefused when torch.fx cannot
    trace the module or nothing became int8.
    """
    problem = _trace(module)
    if isinstance(problem, str):
        raise InputRefused("DT310", f"static int8 must trace the model with torch.fx (got: {problem})",
                           fix='set scheme = "dynamic"')  # fmt: skip
    feeds = list(feeds)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.ao\.quantization is deprecated")
        warnings.filterwarnings("ignore", message=r"torch\.quantize_per_")
        warnings.filterwarnings("ignore", message=r".*reduce_range will be deprecated")
        prepared = quantize_fx.prepare_fx(copy.deepcopy(module).eval(), _mapping(options), tuple(feeds[0].values()))
        with torch.no_grad():
            for named in feeds:
                prepared(**named)
        converted = quantize_fx.convert_fx(prepared)
    done = Counter(type(inner).__name__ for inner in converted.modules() if type(inner) in _INT8)
    if not done:
        raise InputRefused("DT310", "the model must hold layers that can become static int8 (got none)",
                           fix='set scheme = "dynamic", or choose an fp32 target')  # fmt: skip
    return converted.eval(), dict(done)


def _trace(module: nn.Module) -> fx.GraphModule | str:
    """The traced module, or why it cannot be traced: symbolic tracing fails in the model's own ways."""
    try:
        return fx.symbolic_trace(module)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def _mapping(options: tables.FbgemmBuild) -> quantization.QConfigMapping:
    low, high = (-64, 63) if options.weight_bits == 7 else (-128, 127)
    config = quantization.QConfig(
        activation=_OBSERVERS[options.calibration].with_args(dtype=torch.quint8, reduce_range=False),
        weight=quantization.PerChannelMinMaxObserver.with_args(
            dtype=torch.qint8, qscheme=torch.per_channel_symmetric, quant_min=low, quant_max=high
        ),
    )
    mapping = quantization.QConfigMapping().set_global(config)
    for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d):
        mapping.set_object_type(kind, None)  # fbgemm takes one scale per tensor there, which costs too much
    for name in options.exclude:
        mapping.set_module_name(name.removeprefix("module."), None)
    return mapping

"""Which layers the quantization steps work on, and how their weights are put on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.matrices import matrix, matrix_layers, set_matrix
from deploytool.compress.quantize.ranges import SHRINKS
from deploytool.compress.quantize.tables import Layers
from deploytool.compress.select import select
from deploytool.encoding import Encoding
from deploytool.errors import UsageProblem
from deploytool.load.grid import dequantize, quantize

Skipped = list[dict[str, str]]


def chosen_layers(module: nn.Module, settings: Layers) -> tuple[dict[str, nn.Module], Skipped]:
    """The linear and convolution layers that `settings` choose, by name; the others with why they stay as they are."""
    found, skipped = matrix_layers(module)
    chosen = select(found, settings.include, settings.exclude)
    skipped += [{"layer": n, "reason": "not chosen by include and exclude"} for n in found if n not in chosen]
    return {name: layer for name, layer in found.items() if name in chosen}, skipped


def weight_name(layer: str) -> str:
    """The name of a layer's weight; "" is the whole model."""
    return f"{layer}.weight".lstrip(".")


def group_of(weight: Tensor, group: int | str) -> int:
    """Columns of a matrix [out, in] that share a scale: `group`, at most all of them."""
    return weight.shape[1] if group == "channel" else min(int(group), weight.shape[1])


def shrinks_of(settings: Layers) -> Sequence[float]:
    """The ranges that are tried, as shares of the distance between the extremes."""
    return SHRINKS if settings.search else (1.0,)


def put_on(layer: nn.Module, encoding: Encoding, wanted: Tensor | None = None) -> dict[str, Any]:
    """Give a layer the matrix on the grid that is nearest to `wanted` [out, in], its own when left out.

    The weight is a new parameter, the old tensor stays as it is. Returns what the report says of the layer; `error` is
    |change| / |weight| in the Frobenius norm.
    """
    before = matrix(layer)
    codes = quantize(before if wanted is None else wanted, encoding)
    after = dequantize(codes, encoding, before.dtype)
    size = before.float().norm()
    error = (after.float() - before.float()).norm() / size if size > 0 else torch.zeros(())
    set_matrix(layer, after)
    return {
        "bits": encoding.bits, "group": encoding.group, "symmetric": encoding.symmetric,
        "bits_per_weight": bits_per_weight(encoding, after.numel()), "error": float(error),
    }  # fmt: skip


def output_error(weight: Tensor, other: Tensor, moments: Tensor) -> float:
    """|X (W - V)^T| / |X W^T| in the Frobenius norm, from the second moments of the rows of X."""
    form = moments.float()

    def size(matrix: Tensor) -> float:
        return float(((matrix @ form) * matrix).sum().clamp(min=0))

    whole = size(weight.float())
    return (size(weight.float() - other.float()) / whole) ** 0.5 if whole > 0 else 0.0


def bits_per_weight(encoding: Encoding, elements: int) -> float:
    """Bits per weight with its share of the scales (16 bits each) and zero points (as many bits as a code)."""
    overhead = encoding.scale.numel() * (16 + (0 if encoding.symmetric else encoding.bits))
    return encoding.bits + overhead / elements


def refuse_none(step: str, layers: Sequence[Any], skipped: Skipped) -> None:
    """Raise UsageProblem when a step has quantized no layer, with the reasons."""
    if not layers:
        raise UsageProblem("DT204", f"step {step!r} must find a layer to quantize (got none)",
                           detail=[f"{entry['layer']}: {entry['reason']}" for entry in skipped[:20]])  # fmt: skip

"""Which matrix products lose most when they become dynamic int8.

Dynamic int8 as fbgemm and ONNX Runtime do it: weights symmetric per output channel, activations asymmetric uint8 with
one scale per call. The loss of a layer is measured on its own real inputs, in fp32 arithmetic on the int8 grids.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

_SMALL_MODEL = 8  # with fewer layers than this each is a large part of the speed, and none is kept by default
_KEPT = 2


def dynamic_int8_loss(x: np.ndarray, weight: np.ndarray, weight_bits: int) -> float:
    """Relative L2 error of `x @ weight` on int8 grids; x [rows, in], weight [in, out], both float."""
    exact = x @ weight
    got = _on_activation_grid(x) @ _on_weight_grid(weight, weight_bits)
    scale = float(np.linalg.norm(exact))
    return float(np.linalg.norm(got - exact)) / scale if scale else 0.0


def _on_activation_grid(x: np.ndarray) -> np.ndarray:
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255 or 1.0
    zero = np.round(-low / step)
    grid: np.ndarray = (np.clip(np.round(x / step) + zero, 0, 255) - zero) * step
    return grid


def _on_weight_grid(weight: np.ndarray, bits: int) -> np.ndarray:
    limit = 2 ** (bits - 1) - 1
    step = np.abs(weight).max(axis=0, keepdims=True) / limit
    step[step == 0] = 1.0
    grid: np.ndarray = np.clip(np.round(weight / step), -limit, limit) * step
    return grid


def most_sensitive(losses: Mapping[str, float], keep: int | None) -> list[str]:
    """Names of the layers that stay fp32: the `keep` with the largest losses, or the default for so many layers."""
    if keep is None:
        keep = _KEPT if len(losses) >= _SMALL_MODEL else 0
    return sorted(losses, key=lambda name: (-losses[name], name))[:keep]

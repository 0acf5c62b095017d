"""Grids of NVIDIA engines beside int8: fp8 for weights and activations, and weights alone in blocks of int4.

Types: https://onnx.ai/onnx/technical/float8.html and https://onnx.ai/onnx/technical/int4.html; what TensorRT makes of
their Q/DQ pairs: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from onnx import TensorProto, helper

from deploytool.backends.onnx_gptq import gptq
from deploytool.backends.onnx_qdq import Codes, Scheme

_FP8: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(TensorProto.FLOAT8E4M3FN)
_INT4: np.dtype[Any] = helper.tensor_dtype_to_np_dtype(TensorProto.INT4)
_LARGEST = 448.0  # of fp8 with 4 bits of exponent and 3 of mantissa
_MOST_CODE = 7  # int4 is taken as symmetric: -8 has no partner
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)  # of a block's range: outliers cut off buy finer steps for the rest


@dataclass(frozen=True)
class Fp8(Scheme):
    """float8e4m3fn: three bits of mantissa, so that steps grow with the numbers. No zero points."""

    weight_bits: int = 8
    symmetric: bool = True
    name: ClassVar[str] = "fp8"
    opset: ClassVar[int] = 19
    rounds_results: ClassVar[bool] = False
    calibrations: ClassVar[tuple[str, ...]] = ("min-max",)  # steps of large numbers are large: nothing to cut off

    def step(self, low: float, high: float) -> tuple[np.float32, Any]:
        """Scale and zero point of an activation with this range."""
        scale = np.float32(max(-low, high, 0.0) / _LARGEST or 1.0)
        return np.float32(self.held(scale)), np.zeros((), _FP8)[()]

    def rounded(self, x: np.ndarray, low: float, high: float) -> np.ndarray:
        """Activations on their grid, cut off at the ends of the range."""
        step, _ = self.step(low, high)
        return _to_fp8(x / step).astype(np.float32) * step

    def codes(self, weight: np.ndarray, axis: int, least: np.ndarray | None = None, node: str = "") -> Codes:
        """Codes of a weight and the scale of each channel along `axis`."""
        others = tuple(index for index in range(weight.ndim) if index != axis)
        scale = (np.abs(weight).max(axis=others) / _LARGEST).astype(np.float32)
        scale = self.held(np.where(scale == 0, np.float32(1), scale))
        return _to_fp8(weight / scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])), scale


def _to_fp8(numbers: np.ndarray) -> np.ndarray:
    codes: np.ndarray = np.clip(numbers, -_LARGEST, _LARGEST).astype(_FP8)
    return codes


@dataclass(frozen=True)
class Int4(Scheme):
    """Matrices [inputs, outputs] in int4 with a scale for every block of `group` inputs; activations stay as they are.

    grams   X^T X of the inputs of each product, by the name of its node: see onnx_gptq.py
    """

    grams: Mapping[str, np.ndarray] = field(default_factory=dict)
    weight_bits: int = 4
    symmetric: bool = True
    group: int = 64
    _done: dict[str, Codes] = field(default_factory=dict)  # a weight is rounded once, and asked for with every trial
    name: ClassVar[str] = "int4"
    opset: ClassVar[int] = 21
    rounds_inputs: ClassVar[bool] = False
    rounds_results: ClassVar[bool] = False
    calibrations: ClassVar[tuple[str, ...]] = ("min-max",)

    def block(self, inputs: int) -> int:
        """How many inputs share a scale: `group`, or what of it divides the inputs, which blocks must."""
        return next((size for size in (128, 64, 32, 16) if size <= self.group and inputs % size == 0), inputs)

    def codes(self, weight: np.ndarray, axis: int, least: np.ndarray | None = None, node: str = "") -> Codes:
        """Codes [inputs, outputs] and scales [blocks, outputs]."""
        if node not in self._done:
            gram, block = self.grams[node], self.block(len(weight))
            codes, scale = gptq(weight, gram, block, lambda part, n: self.held(block_scale(part, n)), _MOST_CODE)
            self._done[node] = codes.astype(_INT4), scale
        return self._done[node]


def block_scale(block: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The scale [1, outputs] of a block [inputs, outputs] that loses least, each input's error times its count."""
    ends = np.abs(block).max(axis=0, keepdims=True) / _MOST_CODE
    ends = np.where(ends == 0, 1.0, ends)
    best, least = ends, np.full(ends.shape, np.inf)
    for shrink in _SHRINKS:
        scale = ends * shrink
        off = np.square(np.clip(np.round(block / scale), -_MOST_CODE, _MOST_CODE) * scale - block)
        error = (off * counts[:, None]).sum(axis=0, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    found: np.ndarray = best.astype(np.float32)
    return found

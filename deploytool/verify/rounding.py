"""How much of a node's error its precision explains, and how far two tensors are apart when it alone is replayed.

A sum of K products of numbers with independent roundings da and dw has the error sqrt(K) * (rms(a) dw + rms(w) da),
where the rounding of a step s is s / sqrt(12) and that of a float of unit u is u times the number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from deploytool.backends.cut import CutNode
from deploytool.difference import root_mean_square

MASK = 1e30  # beyond it a number stands for infinity: masks are written so
_HALF_MASK = 6e4  # what half precision makes of it
_UNITS = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
_FEW_BITS = ("int8", "int4", "fp8")
_FLOAT_HEADROOM = 512.0  # engines approximate exp, erf and tanh, and sum in any order
_HALF_HEADROOM = 16.0
_STEP_HEADROOM = 4.0
_WORST_CONDITION = 1e3
_RECURRENT_INT8 = 0.2  # recurrent layers feed their own rounding back
QUANTIZED = ("uantize", "Integer", "QLinear", "QAttention", "NBits", "QGemm")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "aten::linear", "aten::matmul", "aten::_convolution", "aten::conv",
             "aten::addmm", "aten::bmm")  # fmt: skip
_SUMS = ("Add", "Sub", "Sum", "Mean", "aten::add", "aten::sub", "aten::sum", "aten::mean")
_EXPONENTIAL = ("Softmax", "Exp", "Sin", "Cos", "Pow", "aten::softmax", "aten::exp")
_NORMS = ("Normalization", "Norm", "Div", "aten::layer_norm", "aten::div", "aten::batch_norm")
_RECURRENT = ("LSTM", "GRU", "RNN", "aten::lstm", "aten::gru")

Value = Callable[[str], np.ndarray | None]


def distance(reference: np.ndarray, candidate: np.ndarray | None) -> float:
    """Relative error by root mean squares; infinity where shapes, whole numbers or infinities differ.

    Numbers that stand for minus infinity in a mask are compared by sign alone.
    """
    if candidate is None or reference.shape != candidate.shape:
        return math.inf
    if reference.dtype.kind != "f":
        return 0.0 if np.array_equal(reference, candidate) else math.inf
    ref, got = reference.astype(np.float64), candidate.astype(np.float64)
    masked = ~(np.abs(ref) < MASK)
    if masked.any():
        if np.any((np.sign(ref) != np.sign(got))[masked] | ~(np.abs(got) > _HALF_MASK)[masked]):
            return math.inf
        ref, got = ref[~masked], got[~masked]
    if not np.isfinite(got).all():
        return math.inf
    size = root_mean_square(ref)
    return root_mean_square(got - ref) / size if size else root_mean_square(got)


def is_quantized(nodes: Sequence[CutNode]) -> bool:
    """Whether any of these nodes computes on whole numbers in place of floats."""
    return any(any(word in node.kind for word in QUANTIZED) for node in nodes)


def in_few_bits(precision: str) -> bool:
    """Whether an artifact of this precision may compute on codes."""
    return precision in _FEW_BITS


def allowed(
    region: Sequence[CutNode], candidates: Sequence[CutNode], values: Value, result: np.ndarray, precision: str,
    floats: str = "fp32",
) -> tuple[float, str]:  # fmt: skip
    """The error that a region of the reference may have in the candidate's arithmetic, and where that comes from.

    `region` are the reference's nodes, `candidates` those that compute the same in the candidate, `result` the
    reference's tensor, `precision` the artifact's: one that promises fp32 has no right to int8 inside. `floats` is what
    an artifact in few bits computes the rest in.
    """
    size = root_mean_square(_plain(result)) or 1.0
    if in_few_bits(precision) and is_quantized(candidates):
        if any(node.kind.endswith(_RECURRENT) for node in region):
            return _RECURRENT_INT8, "what int8 may cost in a recurrent layer"
        noise = sum(_step_noise(node, values) for node in region) + _step(_plain(result)) / math.sqrt(12)
        return _STEP_HEADROOM * noise / size, f"{_STEP_HEADROOM:g} times the rounding of 7 and 8 bit steps here"
    if in_few_bits(precision) and any(node.kind in _SUMS and node.constants for node in region):
        bound = _STEP_HEADROOM * _step(_plain(result)) / math.sqrt(12) / size
        return bound, f"{_STEP_HEADROOM:g} times the rounding of 8 bits, which quantizers correct biases for"
    name = precision if precision in _UNITS else floats
    unit, headroom = _UNITS[name], _FLOAT_HEADROOM if name == "fp32" else _HALF_HEADROOM
    condition = max((_condition(node, values, size) for node in region), default=1.0)
    bound = headroom * unit * min(max(condition, 1.0), _WORST_CONDITION)
    return bound, f"{headroom:g} roundings of {name}, times the node's condition {max(condition, 1.0):.3g}"


def _plain(array: np.ndarray) -> np.ndarray:
    """The numbers that stand for themselves."""
    if array.dtype.kind != "f":
        return np.zeros(0)
    kept: np.ndarray = array[np.abs(array) < MASK]
    return kept


def _operands(node: CutNode, values: Value) -> list[np.ndarray]:
    names: Mapping[int, str] = {**node.inputs, **node.constants}
    found = (values(names[position]) for position in sorted(names))
    return [array for array in found if array is not None and array.dtype.kind == "f" and array.size]


def _step(array: np.ndarray) -> float:
    """One of the 255 steps of 8 bits over a tensor's range, zero included."""
    return (max(float(array.max()), 0.0) - min(float(array.min()), 0.0)) / 255 if array.size else 0.0


def _weight_step(array: np.ndarray) -> float:
    """Steps of 7 bits per output channel, the root mean square over channels: the largest of a channel is 63 steps."""
    if array.ndim < 2:
        return 2 * _step(array)
    axis = tuple(range(1, array.ndim)) if array.ndim > 2 else 0
    return root_mean_square(np.abs(array).max(axis=axis)) / 63


def _step_noise(node: CutNode, values: Value) -> float:
    operands = [_plain(a).reshape(a.shape) if _plain(a).size == a.size else a for a in _operands(node, values)]
    if not node.kind.startswith(_PRODUCTS) or len(operands) < 2:
        return sum(_step(_plain(a)) for a in operands) / math.sqrt(12)
    a, w = operands[:2]
    constant = any(position <= 2 for position in node.constants)
    steps = (_step(a), _weight_step(w) if constant else 2 * _step(w))
    return math.sqrt(_terms(node, a, w) / 12) * (root_mean_square(a) * steps[1] + root_mean_square(w) * steps[0])


def _terms(node: CutNode, a: np.ndarray, w: np.ndarray) -> int:
    """How many products are summed for one number."""
    return int(np.prod(w.shape[1:])) if "onv" in node.kind and w.ndim > 2 else a.shape[-1] if a.ndim else 1


def _condition(node: CutNode, values: Value, size: float) -> float:
    """How many roundings of its operands a node's result may show, by size."""
    operands = _operands(node, values)
    if not operands:
        return 1.0
    if node.kind.startswith(_PRODUCTS) and len(operands) > 1:
        a, w = operands[:2]
        return math.sqrt(_terms(node, a, w)) * root_mean_square(a) * root_mean_square(w) / size
    if node.kind.endswith(_EXPONENTIAL):
        return float(np.abs(_plain(operands[0])).max(initial=1.0))
    if node.kind.startswith(_SUMS) or node.kind.endswith(("ReduceSum", "ReduceMean")):
        return max(root_mean_square(_plain(a)) for a in operands) / size
    if node.kind.endswith(_NORMS):
        spread = float(np.std(_plain(operands[0]))) or 1.0
        return root_mean_square(_plain(operands[0])) / spread
    return 1.0

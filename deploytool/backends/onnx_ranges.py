"""Ranges of an ONNX graph's activations on calibration feeds, for static int8: min-max, percentile or entropy.

The feeds are read twice and nothing but histograms is kept. (The calibrators of onnxruntime 1.31 stop at feeds of
several shapes, and their entropy has as many bins as levels, which leaves it nothing to choose.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, helper

from deploytool.errors import BackendFailed
from deploytool.signature import Feeds

Range = tuple[float, float]

METHODS = ("min-max", "percentile", "entropy")
_BINS = 2048
_CUT = 1e-5  # share of the values that "percentile" leaves out at either end
_LEVELS = 128  # of int8 on one side of zero
_STRIDE = 16  # bins between the thresholds that "entropy" tries
_MASK = 1e30  # beyond this a value stands for infinity, and is no part of a range


@dataclass
class Histogram:
    """Counts of a tensor's values in `_BINS` equal bins from `low` to `high`."""

    low: float
    high: float
    counts: np.ndarray

    def add(self, values: np.ndarray) -> None:
        self.counts += np.histogram(values, _BINS, (self.low, self.high))[0]

    @property
    def edges(self) -> np.ndarray:
        """[bins + 1]."""
        return np.linspace(self.low, self.high, _BINS + 1)


class Activations:
    """Chosen tensors of a graph on calibration feeds."""

    def __init__(self, model: ModelProto, names: Sequence[str], feeds: Sequence[Feeds]) -> None:
        self._names, self._feeds = sorted(names), feeds
        probe = ModelProto()
        probe.CopyFrom(model)
        there = {value.name for value in probe.graph.output}
        probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in self._names if n not in there)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self._session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        self._histograms: dict[str, Histogram] | None = None
        self._ends = self._measure()

    def ranges(self, method: str) -> dict[str, Range]:
        """The range of every tensor by one of `METHODS`."""
        if method == "min-max":
            return dict(self._ends)
        chosen: Callable[[Histogram], Range] = {"percentile": percentile, "entropy": entropy}[method]
        if self._histograms is None:
            self._histograms = self._count()
        return {name: chosen(self._histograms[name]) for name in self._names}

    def _measure(self) -> dict[str, Range]:
        ends: dict[str, Range] = {}
        for name, values in self._values():
            low, high = ends.get(name, (np.inf, -np.inf))
            ends[name] = (min(low, float(values.min())), max(high, float(values.max())))
        missing = [name for name in self._names if name not in ends]
        if missing:
            raise BackendFailed("DT504", "every tensor must have finite values on the calibration feeds "
                                         f"(got none of {', '.join(missing[:5])})")  # fmt: skip
        return ends

    def _count(self) -> dict[str, Histogram]:
        found = {name: Histogram(low, max(high, low + 1e-12 + 1e-6 * abs(low)), np.zeros(_BINS, np.int64))
                 for name, (low, high) in self._ends.items()}  # fmt: skip
        for name, values in self._values():
            found[name].add(values)
        return found

    def _values(self) -> Iterator[tuple[str, np.ndarray]]:
        """Tensors as flat arrays of finite numbers, feed by feed."""
        for one in self._feeds if self._names else ():  # no names would mean all outputs
            for name, array in zip(self._names, self._session.run(self._names, dict(one)), strict=True):
                finite = array[np.abs(array) < _MASK]
                if finite.size:
                    yield name, finite


def percentile(seen: Histogram) -> Range:
    """The range without the outermost 0.001 % of the values at either end."""
    shares = np.cumsum(seen.counts) / max(seen.counts.sum(), 1)
    first = int(np.searchsorted(shares, _CUT, side="right"))
    last = int(np.searchsorted(shares, 1 - _CUT, side="left"))
    return float(seen.edges[min(first, _BINS - 1)]), float(seen.edges[min(last, _BINS - 1) + 1])


def entropy(seen: Histogram) -> Range:
    """The range cut at the threshold that loses least information.

    The distribution of the sizes, cut at a threshold, is compared with what is left of it in 128 levels, by their
    Kullback-Leibler divergence (S. Migacz, 8-bit Inference with TensorRT, GTC 2017).
    """
    largest = max(abs(seen.low), abs(seen.high))
    centers = np.abs((seen.edges[:-1] + seen.edges[1:]) / 2)
    sizes = np.histogram(centers, _BINS, (0.0, largest), weights=seen.counts)[0]
    losses = {bins: _divergence(sizes, bins) for bins in range(_LEVELS, _BINS + 1, _STRIDE)}
    threshold = largest * min(losses, key=lambda bins: (losses[bins], -bins)) / _BINS
    return max(seen.low, -threshold), min(seen.high, threshold)


def _divergence(sizes: np.ndarray, bins: int) -> float:
    """Of the first `bins` with everything beyond in the last of them, from the same in `_LEVELS` levels."""
    kept = sizes[:bins]
    exact = kept.astype(np.float64)
    exact[-1] += sizes[bins:].sum()
    starts = np.arange(_LEVELS) * bins // _LEVELS
    filled = kept > 0
    each = np.add.reduceat(kept, starts) / np.maximum(np.add.reduceat(filled, starts, dtype=np.int64), 1)
    coarse = np.where(filled, np.repeat(each, np.diff([*starts, bins])), 0.0)
    if not coarse.sum():
        return np.inf
    p, q = exact / exact.sum(), coarse / coarse.sum()
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], 1e-12))))

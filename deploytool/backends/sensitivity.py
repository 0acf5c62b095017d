"""Which matrix products lose most when they become dynamic int8, and which of them stay fp32.

Dynamic int8 as fbgemm and ONNX Runtime do it: weights symmetric per output channel, activations asymmetric uint8 with
one scale per call. Two measures, on real inputs: the error that a product makes itself, token by token, picks the
candidates; what that error alone does to the model's outputs ranks them. The first is cheap, the second decides: an
error in an early layer can be small and still turn whole rows around (MiniLM: one product of 36 costs 0.17 of the
worst cosine, the next 0.005).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deploytool.signature import Feeds

CANDIDATES = 12  # products whose effect on the outputs is measured
ROWS = 512  # rows of one feed that the first measure reads
_SMALL_MODEL = 8  # with fewer products than this each is a large part of the speed, and none is kept by default
_LEAST_KEPT = 2
_MOST_KEPT_SHARE = 0.25
_BUDGET_SHARE = 0.5  # of the profile's allowed loss of cosine; the sum below counts each product alone


def int8_noise(x: np.ndarray, weight: np.ndarray, weight_bits: int) -> np.ndarray:
    """What dynamic int8 adds to `x @ weight`; x float [..., in], weight float [in, out] -> float32 [..., out]."""
    noise: np.ndarray = _on_activation_grid(x) @ _on_weight_grid(weight, weight_bits) - x @ weight
    return noise.astype(np.float32, copy=False)


def own_error(x: np.ndarray, weight: np.ndarray, weight_bits: int) -> float:
    """Mean over the rows of `x` of the relative L2 error of `x @ weight`."""
    rows = x.reshape(-1, weight.shape[0])[:ROWS]
    exact = np.linalg.norm(rows @ weight, axis=1)
    # One scale for the whole call: the rows must not be cut before the grid is chosen.
    got = _on_activation_grid(x.reshape(-1, weight.shape[0]))[:ROWS] @ _on_weight_grid(weight, weight_bits)
    error = np.linalg.norm(got - rows @ weight, axis=1)
    return float(np.mean(error / np.maximum(exact, 1e-12)))


def output_loss(reference: Iterable[np.ndarray], outputs: Iterable[np.ndarray]) -> float:
    """1 minus the smallest cosine of an output with its reference; 2 when it is not a number."""
    worst = 0.0
    for exact, got in zip(reference, outputs, strict=True):
        a, b = exact.astype(np.float64).ravel(), got.astype(np.float64).ravel()
        scale = float(np.linalg.norm(a) * np.linalg.norm(b))
        loss = 1.0 - float(a @ b) / scale if scale else float(np.any(a != b))
        worst = max(worst, loss if np.isfinite(loss) else 2.0)
    return worst


def sample_loss(reference: Iterable[np.ndarray], outputs: Iterable[np.ndarray]) -> float:
    """The largest loss of cosine of any sample of a feed, samples counted along the first axis; see output_loss."""
    pairs = [(x, y) for a, b in zip(reference, outputs, strict=True)
             for x, y in (zip(a, b, strict=True) if a.ndim > 1 else ((a, b),))]  # fmt: skip
    return max((output_loss([x], [y]) for x, y in pairs), default=0.0)


def spread(feeds: Iterable[Feeds], count: int) -> list[Feeds]:
    """At most `count` of the feeds, evenly over all: the first alone may all be of one kind."""
    every = list(feeds)
    if len(every) <= count:
        return every
    return [every[round(index * (len(every) - 1) / max(count - 1, 1))] for index in range(count)]


def worth_ranking(products: int, keep: int | None) -> bool:
    """Whether anything can be kept at all."""
    return products > 0 and keep != 0 and (keep is not None or products >= _SMALL_MODEL)


def candidates(errors: Mapping[str, float], keep: int | None) -> list[str]:
    """The products with the largest own errors, enough of them to choose `keep` from."""
    count = max(CANDIDATES, 2 * keep if keep else 0)
    return sorted(errors, key=lambda name: (-errors[name], name))[:count]


def most_sensitive(effects: Mapping[str, float], products: int, keep: int | None, cosine_min: float) -> list[str]:
    """The candidates that stay fp32.

    `keep` of them; left out, at least two, and more (up to a quarter of all products) until the sum of the remaining
    effects is below half of the loss that the profile allows.
    """
    ranked = sorted(effects, key=lambda name: (-effects[name], name))
    if keep is not None:
        return ranked[:keep]
    budget = _BUDGET_SHARE * (1.0 - cosine_min)
    kept = _LEAST_KEPT
    while kept < min(len(ranked), int(products * _MOST_KEPT_SHARE)) and _sum(effects, ranked[kept:]) > budget:
        kept += 1
    return ranked[:kept]


def _sum(effects: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(effects[name] for name in names)


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

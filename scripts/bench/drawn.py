"""Faults drawn from seeds: kind, place and size at random, in models drawn from seeds too; nobody has seen the outputs.

The list in planted.py was written with the outputs seen. These were not: what share of them is caught says more.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
from planted import (
    Fault,
    Plant,
    attribute,
    baked,
    bias_add,
    blockwise,
    clip_at,
    dropped,
    inserted,
    mask_add,
    one_nan,
    quantized,
    replaced,
    stale,
    swapped,
    truncated,
    weight,
)
from varied import KINDS

_MODELS = 40  # seeds of models, so that several faults share one that is built
_PLACES = 12


def drawn_fault(seed: int) -> Fault:
    """A fault; where it cannot be planted, planting raises IndexError, StopIteration, AssertionError or ValueError."""
    draw = random.Random(f"fault {seed}")
    model, target = draw.choice(KINDS), draw.choice(("ort", "ort-int8"))
    pool = _INT8 if target == "ort-int8" and draw.random() < 0.7 else _FLOAT
    kind, make = draw.choice(pool)
    return Fault(f"drawn {seed}", kind, model, target, make(draw), seed=draw.randrange(_MODELS))


def _place(draw: random.Random) -> int:
    return draw.randrange(_PLACES)


def _weight(change: Callable[[random.Random], Callable[[np.ndarray], np.ndarray]]) -> Callable[[random.Random], Plant]:
    return lambda draw: weight(change(draw), _place(draw))


def _codes(
    part: str, change: Callable[[random.Random], Callable[[np.ndarray], np.ndarray]]
) -> Callable[[random.Random], Plant]:
    return lambda draw: quantized(part, change(draw), _place(draw))


def _clipped(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    share = draw.uniform(0.3, 0.8)
    return lambda w: np.clip(w, -np.abs(w).max() * share, np.abs(w).max() * share)


def _cut_off(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    most = draw.choice((12, 24, 40))
    return lambda q: np.clip(q, -most, most)


def _scaled(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    factor = draw.choice((0.5, 0.9, 1.05, 1.2, 2.0))
    return lambda w: w * np.asarray(factor, w.dtype)


def _shifted(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    by = draw.choice((-64, -16, -4, 3, 8, 32))
    return lambda z: z + by


def _one_code(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    at, by = draw.random(), draw.choice((-40, -20, 20, 40))

    def change(codes: np.ndarray) -> np.ndarray:
        codes = codes.astype(np.int64)
        codes.flat[int(at * codes.size)] += by
        return codes.clip(-128, 127)

    return change


def _stale(draw: random.Random) -> Callable[[np.ndarray], np.ndarray]:
    return stale(draw.randrange(1000), draw.choice((0.003, 0.02, 0.1)))


_FLOAT: Sequence[tuple[str, Callable[[random.Random], Plant]]] = (
    ("stale weights", _weight(_stale)),
    ("wrong scale", _weight(_scaled)),
    ("range too narrow", _weight(_clipped)),
    ("transposed weight", lambda d: weight(np.transpose, d.randrange(6), square=True)),
    ("wrong softmax axis", lambda d: attribute("Softmax", "axis", d.choice((1, 2)), d.randrange(3))),
    ("wrong attribute", lambda d: attribute("LayerNormalization", "epsilon", 10 ** d.uniform(-3, -1), d.randrange(6))),
    ("swapped inputs", lambda d: swapped("LayerNormalization", d.randrange(6), 1, 2)),
    ("swapped inputs", lambda d: swapped(d.choice(("Sub", "Div")), d.randrange(2))),
    ("missing mask", lambda d: dropped(mask_add)),
    ("missing bias", lambda d: dropped(bias_add(_place(d)))),
    ("one NaN sample", lambda d: one_nan("LayerNormalization", d.randrange(6))),
    ("baked-in batch", lambda d: baked("Reshape", 1, 0, d.choice((1, 2, 3)), d.randrange(6))),
    ("baked-in sequence length", lambda d: baked("Reshape", 1, 1, d.choice((5, 7, 12)), d.randrange(6))),
    ("truncated vocabulary", lambda d: truncated(d.randrange(40, 95), d.random() < 0.5)),
    ("accuracy level", lambda d: blockwise(_place(d), d.choice((4, 8)), d.choice((0, 4)))),
    ("saturation", lambda d: inserted(d.choice(("MatMul", "Gemm", "Conv", "Add")), _place(d),
                                      clip_at(d.choice((0.2, 0.5, 1.0))))),
    ("wrong activation", lambda d: replaced(*d.choice((("Relu", "Identity"), ("Tanh", "Sigmoid"), ("Sigmoid", "Tanh"),
                                                       ("Erf", "Tanh"), ("Softmax", "Hardmax"))), d.randrange(3))),
)  # fmt: skip
_INT8: Sequence[tuple[str, Callable[[random.Random], Plant]]] = (
    ("wrong zero point", _codes("zero_point", _shifted)),
    ("wrong scale", _codes("scale", _scaled)),
    ("range too narrow", _codes("quantized", _cut_off)),
    ("stale weights", _codes("quantized", lambda d: lambda q: q[::-1])),
    ("stale weights", _codes("quantized", _one_code)),
)

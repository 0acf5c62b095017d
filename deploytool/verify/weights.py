"""Weights that an artifact keeps in whole numbers, beside the model's own.

A weight that was rounded to the nearest lies within half a step of the model's. That holds for every model and every
input, so a wrong scale, zero point, range or number is seen here even where the outputs hardly show it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from deploytool.backends.cut import CutGraph, CutNode, Stored

STEPS_MAX = 1.0  # half a step by rounding; as much again for grids whose last code cannot be reached
_WEIGHT = 1  # the position of a product's weight among its inputs


def weight_pairs(
    region: Sequence[CutNode], candidates: Sequence[CutNode], reference: CutGraph, candidate: CutGraph
) -> Iterator[tuple[str, np.ndarray, Stored]]:
    """Name, the model's weight and what is stored for it, laid out alike, of every product of a region.

    Products and stored weights are taken in the order in which the graphs have them; those whose layouts differ in
    more than a transposition that the operator names are left out.
    """
    stored = [found for node in candidates if (found := candidate.stored(node)) is not None]
    for node in region:
        name = node.constants.get(_WEIGHT)
        weight = reference.constant(name) if name is not None else None
        if name is None or weight is None or weight.dtype.kind != "f" or weight.ndim < 2:
            continue
        if node.attributes.get("transB"):
            weight = weight.T
        found = next((other for other in stored if other.values.shape == weight.shape), None)
        if found is not None:
            stored = [other for other in stored if other is not found]
            yield name, weight.astype(np.float64), found


def steps_off(weight: np.ndarray, stored: Stored) -> float:
    """The largest distance between a weight and what is stored for it, in the steps that it is stored with.

    Infinite where a stored number or a step is none, or the step is nothing and the numbers differ.
    """
    distance = np.abs(stored.values - weight)
    if not (np.isfinite(stored.values).all() and np.isfinite(stored.steps).all()):
        return float("inf")
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(distance == 0, 0.0, distance / np.abs(stored.steps))
    return float(steps.max(initial=0.0))

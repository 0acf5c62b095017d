"""Wanda: weights that are small, or multiply what is small, become zero; nothing is solved or trained.

    score[i, j] = |W[i, j]| ||X[:, j]||_2        compared within every row i

Source: Sun, Liu, Bair, Kolter, "A simple and effective pruning approach for large language models", ICLR 2024, eq. 1.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from deploytool.compress.matrices import squares
from deploytool.compress.prune.by_block import Layer, Pruned, prune_by_block
from deploytool.compress.prune.pattern import keep_in_rows, keep_of_groups
from deploytool.compress.prune.tables import Wanda
from deploytool.compress.step import Context
from deploytool.source import Source


def keep_mask(weight: Tensor, square_sums: Tensor, share: float, kept_of: tuple[int, int] | None) -> Tensor:
    """Bool mask [out, in] from W [out, in] and the sum of squares of every input column [in].

    Every row loses round(share * in) weights, or all but N of every M neighbours with `kept_of` = (N, M).
    """
    score = weight.abs().double() * square_sums.double().sqrt()
    if kept_of is not None:
        return keep_of_groups(score, *kept_of)
    return keep_in_rows(score, round(share * weight.shape[1]))


def apply(source: Source, settings: Wanda, context: Context) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers, block by block."""

    def prune(layer: Layer) -> Pruned:
        return Pruned(layer.weight, keep_mask(layer.weight, layer.total, settings.share, settings.kept_of))

    return prune_by_block(source, settings, context, squares, prune)

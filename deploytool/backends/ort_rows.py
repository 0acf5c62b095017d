"""Runs a fused decoder row by row where it takes only one at a time: several rows with several tokens each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from deploytool.signature import Feeds

_TOKENS = "input_ids"

Run = Callable[[dict[str, np.ndarray]], Sequence[np.ndarray]]


def run_rows(run: Run, feeds: Feeds) -> list[np.ndarray]:
    """`run(feeds)`, or for several rows of several tokens the outputs of each row, joined along axis 0."""
    tokens = feeds.get(_TOKENS)
    if tokens is None or len(tokens) < 2 or tokens.shape[1] < 2:
        return list(run(dict(feeds)))
    rows = [run({name: array[i : i + 1] for name, array in feeds.items()}) for i in range(len(tokens))]
    return [np.concatenate(arrays) for arrays in zip(*rows, strict=True)]

"""Where torch's fast path for fused attention gives other outputs than the plain way, which every lowering takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploytool.cases import read_cases
from deploytool.load.flat import FlatModule
from deploytool.load.plain_attention import FUSED
from deploytool.source import Source

_SAME = 1e-3  # of the largest output: the paths add in another order


def fast_path_differs(source: Source, cases: Path) -> dict[str, Any] | None:
    """How far outputs on the fast path are from the recorded ones; None where they are the same.

    {"cases": how many differ, "of": how many there are, "outputs": their names, "largest": the largest difference over
    the largest output, "failed": what was said against the last case that did not run, or None}
    """
    if not any(isinstance(module, FUSED) for module in source.module.modules()):
        return None
    names = source.signature.output_names
    module = FlatModule(source.module, source.signature.input_names, names, fast_path=True)
    found: dict[str, Any] = {"cases": 0, "of": 0, "outputs": [], "largest": 0.0, "failed": None}
    for case in read_cases(cases):
        found["of"] += 1
        try:
            with torch.inference_mode():
                # Of copies: a module may change its inputs in place.
                outputs = module(*(torch.from_numpy(case.inputs[n].copy()) for n in source.signature.input_names))
            distances = {n: _distance(case.reference[n], t) for n, t in zip(names, outputs, strict=True)}
        except Exception as error:  # nested tensors have limits of their own
            found["failed"] = f"it fails: {str(error)[:200]}"
            continue
        differing = {n: distance for n, distance in distances.items() if distance > _SAME}
        found["cases"] += bool(differing)
        found["outputs"] = list(dict.fromkeys([*found["outputs"], *differing]))
        found["largest"] = max(found["largest"], *differing.values(), 0.0)
    return found if found["cases"] or found["failed"] else None


def _distance(expected: np.ndarray, got: Tensor) -> float:
    """The largest difference over the largest output, 1 where NaN or another shape came out; of whole numbers the
    share of others."""
    given = got.numpy()
    if given.shape != expected.shape:
        return 1.0
    if expected.dtype.kind != "f":
        return float(np.mean(expected != given)) if expected.size else 0.0
    apart = expected != given  # infinities may be equal
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    far = float(np.abs(expected[apart] - given[apart]).max(initial=0.0) / max(largest, 1e-30))
    return far if np.isfinite(far) else 1.0

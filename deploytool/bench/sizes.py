"""Recorded inputs at other sizes of their free dimensions: real values, cut or repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deploytool.cases import Case
from deploytool.errors import UsageProblem, nearest
from deploytool.signature import Outputs, Signature


def resized(signature: Signature, feeds: Outputs, sizes: Mapping[str, int]) -> Outputs:
    """The feeds with the given free dimensions at other sizes; what is missing is repeated from the start.

    Raises UsageProblem for a dimension that the signature lacks, InputRefused for sizes that do not go together.
    """
    unknown = [dim for dim in sizes if dim not in signature.free]
    if unknown:
        raise UsageProblem("DT201", f"sizes are given for the model's free dimensions (got {', '.join(unknown)})",
                           detail=[nearest(unknown[0], signature.free)])  # fmt: skip
    taken = dict(feeds)
    for spec in signature.inputs:
        for axis, dim in enumerate(spec.shape):
            if isinstance(dim, str) and dim in sizes:
                array = taken[spec.name]
                taken[spec.name] = np.take(array, np.arange(sizes[dim]) % array.shape[axis], axis=axis)
    signature.bind(taken)
    return taken


def resized_case(signature: Signature, cases: Sequence[Path], sizes: Mapping[str, int], out: Path) -> Path:
    """A case of those sizes below `out`, made from the recorded case that is nearest to them: real values, not zeros.

    A recorded case of just these sizes is taken as it is.
    """

    def distance(path: Path) -> float:
        there = signature.bind(Case.load(path).inputs)
        # Cutting keeps what stands together, repeating does not: a case that is too small is the farther one.
        return sum(float(max(there[d] / n, 4 * n / there[d])) if there[d] != n else 0.0 for d, n in sizes.items())

    unknown = [dim for dim in sizes if dim not in signature.free]
    chosen = cases[0] if unknown else min(cases, key=distance)
    path = out / ("-".join(f"{dim}{size}" for dim, size in sorted(sizes.items())) + ".npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    Case(resized(signature, Case.load(chosen).inputs, sizes)).save(path)
    return path

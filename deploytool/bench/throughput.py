"""Items per second at several batch sizes, one after the other in one warmed process, each in turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.bench.compare import Process
from deploytool.bench.sizes import resized_case
from deploytool.cases import case_files
from deploytool.errors import InputRefused
from deploytool.signature import Signature
from deploytool.worker import Limits, Worker

_TURNS = 4


def batch_dimension(signature: Signature) -> str:
    """The free dimension that is the first axis of every input that has it; raises InputRefused where there is none."""
    first = [dim for dim in signature.free if all(dim not in spec.shape[1:] for spec in signature.inputs)]
    if not first:
        raise InputRefused("DT313", f"throughput needs a free batch dimension (got {signature})",
                           fix="export the model with a free first dimension")  # fmt: skip
    return first[0]


def throughput(
    artifact: Artifact, cases: Path, batches: Sequence[int], work: Path, limits: Limits, *, seconds: float, seed: int,
    settings: dict[str, Any] | None = None, opener: str | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Per batch size: p50_ms of a run, items_per_s, runs. `seconds` are for all; the sizes take turns in random order.

    Inputs are recorded ones of the folder `cases`, repeated to the size; they are written below `work`.
    """
    dim = batch_dimension(artifact.signature)
    made = {n: resized_case(artifact.signature, case_files(cases), {dim: n}, work) for n in batches}
    rng = np.random.default_rng(seed)
    times: dict[int, list[float]] = {n: [] for n in batches}
    with Worker("bench throughput", limits) as worker:
        named: dict[str, Any] = {"opener": opener} if opener else {}
        process = Process(worker, artifact, made[batches[0]], settings=settings, **named)
        for case in made.values():
            process.take(case)
        for _ in range(_TURNS):
            for n in rng.permutation(list(batches)).tolist():
                process.take(made[n])
                got = process.time_block(seconds / (_TURNS * len(batches)))
                times[n] += got[1:] or got
    middle = {n: float(np.median(t)) for n, t in times.items()}
    return [{"batch": n, "p50_ms": ms, "items_per_s": 1e3 * n / ms, "runs": len(times[n])} for n, ms in middle.items()]

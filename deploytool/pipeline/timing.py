"""Finished artifacts timed by themselves: the machine's noise floor, and throughput over batch sizes."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploytool.artifact import GOLDEN
from deploytool.bench.compare import compare
from deploytool.bench.environment import environment
from deploytool.bench.noise import ITSELF, noise_floor
from deploytool.bench.throughput import throughput
from deploytool.cases import case_files
from deploytool.pipeline.again import _one_artifact
from deploytool.pipeline.export import SCHEMA_VERSION, Options, Say


def noise_of(path: Path, options: Options, say: Say) -> dict[str, Any]:
    """One artifact against itself; what `bench --aa` prints."""
    with _one_artifact(path) as artifact:
        timed = compare(artifact, {ITSELF: artifact}, case_files(artifact.folder / GOLDEN)[0], limits=options.limits,
                        budget_seconds=options.bench_seconds, seed=options.seed, report=say)  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "artifact": str(path), **timed, "noise": noise_floor(timed)}


def throughput_of(path: Path, batches: Sequence[int], options: Options) -> dict[str, Any]:
    """Items per second of one artifact at these batch sizes; what `bench --batch` prints."""
    with _one_artifact(path) as artifact, tempfile.TemporaryDirectory(prefix="deploytool-") as work:
        rows = throughput(artifact, artifact.folder / GOLDEN, batches, Path(work), options.limits,
                          seconds=options.bench_seconds, seed=options.seed)  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "artifact": str(path), "environment": environment(), "throughput": rows}

"""Finished artifacts timed by themselves: noise floor, throughput over batch sizes, share of the roofline."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact
from deploytool.backends.engine import threads_of
from deploytool.bench.environment import environment
from deploytool.bench.noise import ITSELF, noise_floor
from deploytool.bench.roofline import roofline
from deploytool.bench.serve import THREAD_LIMITS
from deploytool.bench.throughput import throughput
from deploytool.errors import InputRefused
from deploytool.pipeline.again import _model_of, _one_artifact, inputs_at, timed
from deploytool.pipeline.export import SCHEMA_VERSION, Options, Say


def noise_of(path: Path, sizes: Mapping[str, int], options: Options, say: Say) -> dict[str, Any]:
    """One artifact against itself; what `bench --aa` prints."""
    with _one_artifact(path) as artifact, inputs_at(artifact, sizes) as case:
        found = timed(artifact, {ITSELF: artifact}, case, options, say)
    return {"artifact": str(path), **found, "noise": noise_floor(found)}


def throughput_of(path: Path, batches: Sequence[int], options: Options) -> dict[str, Any]:
    """Items per second of one artifact at these batch sizes; what `bench --batch` prints."""
    with _one_artifact(path) as artifact, tempfile.TemporaryDirectory(prefix="deploytool-") as work:
        rows = throughput(artifact, artifact.folder / GOLDEN, batches, Path(work), options.limits,
                          seconds=options.bench_seconds, seed=options.seed)  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "artifact": str(path), "environment": environment(), "throughput": rows}


def roofline_of(path: Path, sizes: Mapping[str, int], options: Options, say: Say) -> dict[str, Any]:
    """One artifact's time against the least that this machine allows; what `bench --roofline` prints.

    Operations are those of the model that it was made from, on the case that is timed; bytes are its files.
    """
    with _one_artifact(path) as artifact, inputs_at(artifact, sizes) as case:
        ref = _model_of(artifact)
        if ref is None or not ref.has_module:
            raise InputRefused("DT301", "the artifact's PyTorch model must be here to count its operations",
                               fix="export it again from its model")  # fmt: skip
        say("counting operations")
        flop = worker.run(f"counting {ref.name}", "deploytool.load.flops:flops_job", options.limits,
                          ref=asdict(ref), case=str(case))  # fmt: skip
        say("measuring the machine, before and after")
        before = _peaks(artifact, options)
        found = timed(artifact, {}, case, options, say)
        share = roofline(found["p50_ms"], flop, artifact.size_bytes, before, _peaks(artifact, options))
    return {"artifact": str(path), **found, "roofline": share}


def _peaks(artifact: Artifact, options: Options) -> dict[str, float]:
    """What the machine can do with as many threads as the artifact runs with."""
    with worker.Worker("bench roofline", options.limits, THREAD_LIMITS) as machine:
        machine.create("deploytool.bench.roofline:Machine", threads=threads_of(artifact))
        peaks: dict[str, float] = machine.invoke("peaks")
        return peaks

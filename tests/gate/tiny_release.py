"""A tiny release without any runtime: the engine is a matrix in a file, and NumPy runs it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.signature import Outputs, Signature, TensorSpec

WEIGHT = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 4)),),
    (TensorSpec("plain", "float32", ("batch", 3)), TensorSpec("shifted", "float32", ("batch", 3))),
)


def run(artifact: Artifact, x: np.ndarray) -> Outputs:
    """What the engine computes."""
    plain = x @ np.load(artifact.main_file)
    return {"plain": plain, "shifted": plain - np.float32(3)}


def replay(artifact: Artifact, cases: Sequence[Case]) -> list[Outputs]:
    """What the pipeline's replay does in a worker."""
    return [run(artifact, case.inputs["x"]) for case in cases]


def same_speed(candidate: Artifact, released: Artifact) -> dict[str, Any]:
    return {"speedup": 1.0, "speedup_ci": [0.98, 1.02]}


def make(folder: Path, *, weight: np.ndarray = WEIGHT, signature: Signature = SIGNATURE, padding: int = 0,
         report: dict[str, Any] | None = None, **changes: Any) -> Artifact:  # fmt: skip
    """An exported artifact: engine, golden cases, report."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "engine.npy", weight)
    (folder / "padding.bin").write_bytes(bytes(padding))
    fields: dict[str, Any] = {"backend": "numpy", "format": "matrix", "entry": "engine.npy", "precision": "fp32",
                              "signature": signature, "target": target(), **changes}  # fmt: skip
    artifact = Artifact(folder, **fields)
    random = np.random.default_rng(1)
    for index in range(3):
        x = random.standard_normal((2, 4)).astype(np.float32)
        reference = {"plain": x @ WEIGHT, "shifted": x @ WEIGHT - np.float32(3)}
        Case({"x": x}, reference, run(artifact, x)).save(folder / "golden" / f"{index:03}.npz")
    return finish(artifact, report)


def target(**changes: Any) -> dict[str, Any]:
    return {"name": "cpu", "parity": {"cosine_min": 0.999}, "device": {"architecture": "x86_64"}, **changes}


def finish(artifact: Artifact, report: dict[str, Any] | None = None) -> Artifact:
    """Record the files as they are now and write a report that belongs to them."""
    artifact = artifact.save()
    digest = hashlib.sha256((artifact.folder / "artifact.json").read_bytes()).hexdigest()
    figures = {"cosine": 1.0, "max_abs": 0.0}
    data = {"status": "ok", "artifact_digest": digest, "executed": True,
            "parity": {"passed": True, "cases": 3, "outputs": {"plain": figures, "shifted": figures}},
            "quality": {"accuracy": {"reference": 0.95, "candidate": 0.95, "lower_is_better": False},
                        "loss": {"reference": 2.0, "candidate": 2.0, "lower_is_better": True}},
            "memory": {"peak_rss_bytes": 100_000_000}, **(report or {})}  # fmt: skip
    (artifact.folder / "report.json").write_text(json.dumps(data))
    return artifact

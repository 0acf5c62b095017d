"""Artifacts of the tiny sources beside this file, each built once in a run."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.backends.base import Request, build_artifact, find_backend, load_checked_target
from deploytool.signature import Outputs
from deploytool.source import ModelRef, Source
from deploytool.target import Target, target_names

TINY = Path(__file__).parent / "tiny"


def profiles() -> list[Target]:
    """The shipped profiles."""
    return [load_checked_target(name) for name in target_names()]


def need(target: Target) -> None:
    """Skip with the reason where the target's packages are not installed."""
    probe = find_backend(target.backend).probe(target)
    if not probe.available:
        pytest.skip(f"{target.name}: {probe.reason}")


class Workshop:
    """Opens tiny sources, lowers them, builds artifacts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source: Callable[[str], Source] = cache(self._source)
        self.portable: Callable[[str], Artifact] = cache(self._portable)
        self.artifact: Callable[[str, str], Artifact] = cache(self._artifact)

    def _source(self, name: str) -> Source:
        pytest.importorskip("torch")
        from deploytool.load.model import open_source

        return open_source(ModelRef("python", name, str(TINY / f"{name}.py")))

    def _portable(self, name: str) -> Artifact:
        pytest.importorskip("onnxscript")
        from deploytool.lower.onnx import lower_onnx

        return lower_onnx(self.source(name), self.folder / name / "onnx")

    def _artifact(self, name: str, target: str) -> Artifact:
        return build_artifact(self.request(name, load_checked_target(target)), {})

    def request(self, name: str, target: Target, **build: Any) -> Request:
        """A request as the pipeline makes it; `build` changes the profile's build settings."""
        need(target)
        source = self.source(name)
        out = self.folder / name / f"{target.name}-{len(list(self.folder.rglob('*')))}"
        out.mkdir(parents=True)
        return Request(
            target=target.model_copy(update={"build": {**target.build, **build}}),
            signature=source.signature,
            source=source,
            portable=self.portable(name) if find_backend(target.backend).accepts == "onnx" else None,
            calibration=lambda: self.feeds(name),
            cases=lambda: self.feeds(name),
            out=out,
            references=lambda: (self.reference(name, feeds) for feeds in self.feeds(name)),
        )

    def feeds(self, name: str) -> list[Outputs]:
        """The source's samples as arrays."""
        return [{key: value.numpy() for key, value in sample.items()} for sample in self.source(name).samples()]

    def reference(self, name: str, feeds: Outputs) -> Outputs:
        """What the live module gives."""
        import torch

        source = self.source(name)
        with torch.inference_mode():
            outputs = source.flat(*(torch.from_numpy(feeds[key]) for key in source.signature.input_names))
        return {key: value.numpy() for key, value in zip(source.signature.output_names, outputs, strict=True)}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Of two arrays as vectors."""
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)))

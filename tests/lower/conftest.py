"""Small sources of every kind that lowering must take, and what runs a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.lower.onnx import lower_onnx  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402
from deploytool.source import ModelRef, Source  # noqa: E402


class Flat(torch.nn.Module):
    """Positional tensors in, a tuple out, as the loader makes them."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        result = self.module(*tensors)
        return result if isinstance(result, tuple) else (result,)


@pytest.fixture
def make_source() -> Callable[..., Source]:
    """make(module, {name: free and fixed dims}, {name: dims}, samples): a source; types are read off the samples."""

    def make(
        module: torch.nn.Module, inputs: dict[str, tuple[Any, ...]], outputs: dict[str, tuple[Any, ...]],
        samples: Sequence[tuple[torch.Tensor, ...]],
    ) -> Source:  # fmt: skip
        flat = Flat(module).eval()
        with torch.no_grad():
            results = flat(*samples[0])
        specs = [
            tuple(TensorSpec(name, str(tensor.dtype).removeprefix("torch."), shape)
                  for (name, shape), tensor in zip(named.items(), tensors, strict=True))
            for named, tensors in ((inputs, samples[0]), (outputs, results))
        ]  # fmt: skip
        feeds = [dict(zip(inputs, sample, strict=True)) for sample in samples]
        return Source(ModelRef("python", "test", "test.py"), flat.module, flat, Signature(*specs), lambda: feeds)

    return make


def run(artifact: Artifact, feeds: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The outputs of the artifact's graph in ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(artifact.main_file, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in feeds.items()}))


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Artifact]:
    """check(source): lower it and demand eager's numbers at the shape of every sample."""

    def check(source: Source, tolerance: float = 1e-5, **options: Any) -> Artifact:
        artifact = lower_onnx(source, tmp_path / "onnx", **options)
        for feeds in source.samples():
            with torch.no_grad():
                expected = source.flat(*feeds.values())
            got = run(artifact, feeds)
            assert len(got) == len(expected)
            for array, tensor in zip(got, expected, strict=True):
                assert array.dtype == tensor.numpy().dtype
                np.testing.assert_allclose(array, tensor.numpy(), atol=tolerance, rtol=tolerance)
        return artifact

    return check

"""torch's fused attention modules come out of the exporter with free sizes, and stay as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

from deploytool.lower.onnx import lower_onnx  # noqa: E402


def test_torchs_own_transformer_runs_at_other_sizes(make_source: Callable[..., Any], tmp_path: Path) -> None:
    """Encoder and decoder must agree at sizes that the trace did not see; the module keeps its fused parts."""
    torch.manual_seed(0)
    module = torch.nn.Transformer(16, 2, 1, 1, 16, batch_first=True).eval().requires_grad_(False)

    def sample(batch: int, read: int, written: int) -> tuple[Any, Any]:
        return torch.randn(batch, read, 16), torch.randn(batch, written, 16)

    inputs = {"src": ("b", "s", 16), "tgt": ("b", "t", 16)}
    source = make_source(module, inputs, {"y": ("b", "t", 16)}, [sample(2, 5, 3)])
    artifact = lower_onnx(source, tmp_path / "out", exporter="torchscript")
    kept = [type(part) for part in module.modules() if isinstance(part, torch.nn.MultiheadAttention)]
    assert len(kept) == 3 and torch.backends.mha.get_fastpath_enabled()
    session = onnxruntime.InferenceSession(artifact.main_file)
    for src, tgt in (sample(1, 7, 4), sample(3, 2, 6)):
        (got,) = session.run(None, {"src": src.numpy(), "tgt": tgt.numpy()})
        torch.testing.assert_close(torch.from_numpy(got), module(src, tgt), rtol=1e-4, atol=1e-5)

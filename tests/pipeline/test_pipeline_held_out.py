"""A user's own language model, exported: its quality is in the report, or the report says that there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytest.importorskip("transformers")

import tiny_lm

from deploytool.verify import quality

Exported = Callable[..., dict[str, Any]]


def test_a_language_model_is_judged_by_its_quality(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity and greedy tokens must be those of each artifact, and one that is sure of wrong words must fail."""
    folder = tiny_lm.save(tmp_path / "lm")
    (result,) = exported(str(folder), "ort")["targets"]
    assert result["status"] == "ok", result["reason"]
    found = result["quality"]["perplexity"]
    assert found["candidate"] == pytest.approx(found["reference"], rel=1e-4) and found["reference"] > 2
    assert result["generation"]["agreement"] == 1.0
    assert not any("no quality was measured" in said for said in result["findings"])
    right = quality.tensor_predict

    def planted(runner: Any) -> Any:
        predict = right(runner)
        weak = type(runner).__module__.endswith("onnxruntime")
        return lambda feeds: {n: t * 1.5 if weak and n == "logits" else t for n, t in predict(feeds).items()}

    monkeypatch.setattr(quality, "tensor_predict", planted)
    (result,) = exported(str(folder), "ort", out="weak")["targets"]
    assert result["status"] == "failed" and "metric 'perplexity' may lose" in result["reason"]


def test_without_a_tokenizer_the_absence_is_told(exported: Exported, tmp_path: Path) -> None:
    """No text, no quality: the report must say so and what to do."""
    folder = tiny_lm.save(tmp_path / "lm")
    (folder / "tokenizer.json").unlink()
    (result,) = exported(str(folder), "ort")["targets"]
    assert result["status"] == "ok" and result["quality"] == {} and result["generation"] is None
    assert any("no quality was measured" in said and "tokenizer.json" in said for said in result["findings"])

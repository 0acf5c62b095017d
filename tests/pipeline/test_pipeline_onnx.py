"""An ONNX file from end to end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
import tiny_onnx

from deploytool.pipeline.again import verify_again
from deploytool.pipeline.export import Options

Exported = Callable[..., dict[str, Any]]


def test_a_file_goes_to_every_target_that_takes_its_graph(exported: Exported, tmp_path: Path) -> None:
    """Targets of the graph must be ok, those of the module unavailable with a reason; synthetic samples are told."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx", external=True)
    report = exported(str(path), "ort", "ort-int8", "eager", "torchscript", "fbgemm")
    results = {result["target"]: result for result in report["targets"]}
    assert [name for name, result in results.items() if result["status"] == "ok"] == ["ort", "ort-int8", "eager"]
    assert {results[name]["status"] for name in ("torchscript", "fbgemm")} == {"unavailable"}
    assert "only its graph" in results["fbgemm"]["reason"]
    assert results["ort"]["parity"]["shapes"] >= 3
    assert any("synthetic" in finding for finding in results["ort"]["findings"])
    assert not list((tmp_path / "out" / "ort").glob("*.bin")), "small weights belong into the graph"


def test_samples_of_the_user_are_what_is_compared(exported: Exported, tmp_path: Path) -> None:
    """With samples nothing is synthetic, the first is the first golden case, and verify finds the model again."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx")
    ids = np.arange(12).reshape(2, 6)
    np.savez(tmp_path / "s.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    (result,) = exported(str(path), "ort", samples=tmp_path / "s.npz")["targets"]
    assert result["status"] == "ok" and not any("synthetic" in finding for finding in result["findings"])
    with np.load(tmp_path / "out/ort/golden/000.npz") as case:
        assert (case["in.input_ids"] == ids).all()
    again = verify_again(tmp_path / "out" / "ort", None, Options(out=tmp_path), lambda line: None)
    said = " ".join(again["targets"][0]["findings"])
    assert again["targets"][0]["status"] == "ok" and "changed" not in said and "not here" not in said


def test_a_changed_weight_is_found(exported: Exported, tmp_path: Path) -> None:
    """An artifact must fail when it is compared with another file of the same signature."""
    model = tiny_onnx.text_model()
    path = tiny_onnx.save(model, tmp_path / "m.onnx")
    exported(str(path), "ort")
    weight = next(t for t in model.graph.initializer if t.name == "weight")
    weight.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(weight), "weight"))
    tiny_onnx.save(model, path)
    again = verify_again(tmp_path / "out" / "ort", None, Options(out=tmp_path), lambda line: None)
    assert again["targets"][0]["status"] == "failed"


def test_old_operator_sets_are_brought_up_to_date(exported: Exported, tmp_path: Path) -> None:
    """A file of operator set 9 must come out in one that every engine takes, and compute the same."""
    path = tiny_onnx.save(tiny_onnx.image_model(), tmp_path / "m.onnx")
    (result,) = exported(str(path), "ort")["targets"]
    written = onnx.load(tmp_path / "out" / "ort" / "model.onnx")
    assert result["status"] == "ok" and written.opset_import[0].version == 18
    assert [value.name for value in written.graph.input] == ["x"]


def test_a_graph_that_does_not_run_is_made_by_the_other_exporter(
    exported: Exported, tmp_path: Path
) -> None:
    """An engine that refuses the traced graph at some size must lead to the other exporter, not to an end."""
    path = tmp_path / "fixed.py"
    path.write_text(
        "import torch\nfrom torch import nn\n\n\nclass Fixed(nn.Module):\n"
        "    def forward(self, x):\n        return {'y': x.reshape(int(x.shape[0]), 4, 2).flatten(1) * 2}\n\n\n"
        "def build():\n    return Fixed()\n\n\n"
        "def samples():\n    return [{'x': torch.randn(n, 8)} for n in (2, 3, 5)]\n"
    )
    (result,) = exported(str(path), "ort")["targets"]
    assert result["status"] == "ok", result["reason"]
    assert any("made by dynamo" in finding for finding in result["findings"])

"""Saved figures judged again, and what cannot be bisected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploytool.artifact import Artifact
from deploytool.errors import InputRefused
from deploytool.pipeline.again import verify_again
from deploytool.pipeline.export import Options
from deploytool.pipeline.saved import judge_saved

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
from onnx import numpy_helper

Exported = Callable[..., dict[str, Any]]


def searched(path: Path, **named: Any) -> list[Any]:
    report = verify_again(path, None, Options(out=path), lambda line: None, find_node=True, **named)
    json.dumps(report, allow_nan=False)
    return list(report["targets"])


def test_saved_figures_are_judged_without_running(model: str, exported: Exported, tmp_path: Path) -> None:
    """A report must be judged by its own profile, or by another one, from its figures alone: no job may run."""
    exported(model, "ort")
    out = tmp_path / "out"
    for path in (out, out / "ort", out / "report.json"):
        (result,) = judge_saved(path, None)["targets"]
        assert result["status"] == "ok" and result["findings"] == ["judged by saved figures: nothing was run"]
    strict = tmp_path / "strict.toml"
    strict.write_text('name = "strict"\ndescription = "d"\nbackend = "onnxruntime"\nprecision = "fp32"\n'
                      "[parity]\ncosine_min = 0.9\nsqnr_db_min = 299\n")  # fmt: skip
    (result,) = judge_saved(out, str(strict))["targets"]
    assert result["status"] == "failed" and "SQNR must be at least 299" in result["reason"]
    assert not result["parity"]["passed"]


def test_what_failed_without_figures_stays_failed(model: str, exported: Exported, tmp_path: Path) -> None:
    """A target that could not be built must not vanish from the verdict on the report that says so."""
    report = exported(model, "ort")
    reason = "the operator must be known (got Mystery)"
    lost = {**report["targets"][0], "target": "openvino", "status": "failed", "reason": reason, "parity": None}
    absent = {**lost, "target": "trt", "status": "unavailable"}
    (tmp_path / "r.json").write_text(json.dumps({**report, "targets": [*report["targets"], lost, absent]}))
    found = judge_saved(tmp_path / "r.json", None)["targets"]
    assert [(r["target"], r["status"]) for r in found] == [("ort", "ok"), ("openvino", "failed")]
    assert found[1]["reason"] == reason


@pytest.mark.parametrize("text", ["[]", "{}", "no json", '{"targets": []}', '{"targets": [{"target": "x"}]}',
                                  '{"targets": [{"target": "x", "parity": {"cases": 1}}]}'])  # fmt: skip
def test_what_is_no_report_is_refused(text: str, tmp_path: Path) -> None:
    """A file without figures must be refused: it could not fail."""
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(InputRefused):
        judge_saved(tmp_path / "r.json", "ort")


def test_a_stale_weight_is_found_through_the_whole_pipeline(model: str, exported: Exported, tmp_path: Path) -> None:
    """verify with a search must fail an artifact whose weight changed, and name its node, module and cause."""
    exported(model, "ort")
    folder = tmp_path / "out" / "ort"
    (whole,) = searched(folder)
    assert whole["status"] == "ok" and whole["bisect"]["found"] == "nothing"
    graph = onnx.load(folder / "model.onnx")
    tensor = next(t for t in graph.graph.initializer if t.name.startswith("2.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[5] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, folder / "model.onnx")
    Artifact.load(folder, check=False).save()
    (result,) = searched(folder)
    assert result["status"] == "failed" and not result["parity"]["passed"]
    found = result["bisect"]
    assert (found["found"], found["module"], found["cause"]) == ("node", "2", "stale weight")
    assert found["error_before"] < 1e-6 < found["error_after"]


@pytest.mark.parametrize("target", ["torchscript", "fbgemm", "openvino"])
def test_other_engines_are_searched(target: str, model: str, exported: Exported, tmp_path: Path) -> None:
    """An artifact of another model's weights must be traced to the first layer, on every kind of graph."""
    pytest.importorskip("openvino")
    exported(model, target)
    folder = tmp_path / "out" / target
    text = Path(model).read_text()
    other = tmp_path / "tiny.py"
    other.write_text(text.replace("return nn.Sequential(nn.Linear(8, 32)", "first = nn.Linear(8, 32)\n"
                     "    nn.init.normal_(first.weight)\n    return nn.Sequential(first"))  # fmt: skip
    report = verify_again(folder, str(other), Options(out=folder), lambda line: None, find_node=True)
    found = report["targets"][0]["bisect"]
    assert found["found"] == "node" and found["module"] == "0" and found["replays"] < 30, found


def test_what_cannot_be_searched_is_refused(model: str, exported: Exported, tmp_path: Path) -> None:
    """No graph, or no model to compare it with: a clear refusal before any work."""
    exported(model, "ort", "eager")
    with pytest.raises(InputRefused, match="only an artifact with a graph can be bisected"):
        searched(tmp_path / "out" / "eager")
    folder = tmp_path / "out" / "ort"
    opened = Artifact.load(folder, check=False)
    replace(opened, model={"name": "gone", "fingerprint": ""}).save()
    with pytest.raises(InputRefused, match="the model must be here to find where ort parts from it"):
        searched(folder)

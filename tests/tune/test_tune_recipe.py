"""A search over what a recipe makes of the model, from the command to the export that makes the result again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploytool.artifact import Artifact
from deploytool.cli.main import run
from deploytool.compress.recipe import load_recipe

RECIPE = """
[[compress]]
step = "svd"
keep = 0.25
"""


def test_the_smallest_is_a_compressed_one(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """For size the recipe's result is chosen; the project file names it, and an export there gives the same engine."""
    for module in ("torch", "onnxruntime"):
        pytest.importorskip(module)
    recipe, out = tmp_path / "thin.toml", tmp_path / "best"
    recipe.write_text(RECIPE)
    asked = ["--objective", "size", "--max-drop", "100%", "--bench-seconds", "0", "-r", str(recipe), "-o", str(out)]
    assert run(["tune", model, "-t", "ort", *asked, "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["chosen"]["name"] == "thin + ort" and result["front"]
    sizes = {one["name"]: one["size_bytes"] for one in result["configurations"]}
    assert sizes["thin + ort"] < sizes["ort"]
    chosen = Artifact.load(out / "chosen")
    assert chosen.target["name"] == "ort-tuned" and (out / "chosen" / "report.json").is_file()
    assert load_recipe(out / "deploytool.toml").model == "./compressed"
    assert load_recipe(out / "recipe.toml").steps
    monkeypatch.chdir(out)
    assert run(["export", "--no-bench", "--no-quality", "-o", "again", "-q"]) == 0
    again = {f.path: f.sha256 for f in Artifact.load(out / "again" / "ort-tuned").files}
    assert again["model.onnx"] == {f.path: f.sha256 for f in chosen.files}["model.onnx"]


def test_what_a_recipe_cost_counts_without_a_metric(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a model without evaluate() the loss is that of the outputs against the uncompressed model's."""
    for module in ("torch", "onnxruntime"):
        pytest.importorskip(module)
    plain, recipe, out = tmp_path / "plain.py", tmp_path / "thin.toml", tmp_path / "best"
    plain.write_text(Path(model).read_text().partition("def evaluate")[0])
    recipe.write_text(RECIPE)
    asked = ["--objective", "size", "--max-drop", "1%", "--bench-seconds", "0", "-r", str(recipe), "-o", str(out)]
    assert run(["tune", str(plain), "-t", "ort", *asked, "--json", "-q"]) == 0
    result = json.loads(capsys.readouterr().out)
    found = {one["name"]: one for one in result["configurations"]}
    assert result["chosen"]["name"] == "ort" and found["ort"]["drop"] < 1e-6
    assert found["thin + ort"]["status"] == "refused" and found["thin + ort"]["drop"] > 0.01
    report = json.loads((out / "chosen" / "report.json").read_text())
    settings = Artifact.load(out / "chosen").settings
    assert report["ran"]["flops"] > 0 and report["ran"] == settings["ran"] and "ran" not in report["parity"]

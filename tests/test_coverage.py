"""The table of architectures and targets: a few of its cells, and how cells are judged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "coverage.py"
for package in ("torch", "transformers", "onnxruntime", "onnxscript"):
    pytest.importorskip(package)


@pytest.fixture(scope="module")
def coverage() -> ModuleType:
    spec = importlib.util.spec_from_file_location("coverage_of_families", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cells_that_must_stay_ok(tmp_path: Path) -> None:
    """A language model with narrow heads and a recurrent module must come through, each compared at all its sizes."""
    command = [sys.executable, str(SCRIPT), "--family", "Llama", "--family", "GRU", "--target", "torchscript",
               "--target", "ort", "--json", str(tmp_path / "c.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    cells = json.loads((tmp_path / "c.json").read_text())
    assert {f: {t: c["status"] for t, c in row.items()} for f, row in cells.items()} == {
        family: dict.fromkeys(("torchscript", "ort"), "ok") for family in ("Llama", "GRU")
    }, cells
    assert "| Llama | ok | ok |" in done.stdout and "- ort: 2 of 2 ok" in done.stdout


@pytest.mark.parametrize(
    ("code", "status"),
    [("DT305", "not exportable"), ("DT310", "not exportable"), ("DT900", "crashed"), ("DT501", "crashed")],
)
def test_errors_are_told_from_crashes(coverage: ModuleType, code: str, status: str) -> None:
    """A refusal is a miss with its reason; an error of the tool's own, or a killed worker, is a crash."""
    error: dict[str, Any] = {"code": code, "message": "must", "detail": ["why"]}
    assert coverage.cell("failed", error) == {"status": status, "reason": "must; why"}


def test_figures_outside_the_limits_are_no_ok(coverage: ModuleType) -> None:
    """An artifact that was built but computes something else must show as such, and its reason stand in the table."""
    cells = {"X": {"ort": coverage.cell("failed", None, "output 'y': cosine"), "trt": coverage.cell("ok", None)}}
    assert cells["X"]["ort"]["status"] == "parity failed"
    said = coverage.table(cells, ["ort", "trt"])
    assert "- ort: 0 of 1 ok" in said and "- trt: 1 of 1 ok" in said and "- X, ort: output 'y': cosine" in said


def test_every_family_of_the_table_is_asked_for(coverage: ModuleType) -> None:
    """The documented table must have a row for every family of the script, and no other."""
    text = (SCRIPT.parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    table = text[text.index("| family |") :].partition("\n\n")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert set(rows) - {"family"} == {*coverage.FAMILIES, *coverage.PLAIN}

"""One artifact timed by itself: against itself, over batch sizes, against the machine's own speed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploytool.cli.main import run
from deploytool.errors import InputRefused
from deploytool.pipeline.export import Options
from deploytool.pipeline.timing import noise_of, roofline_of, throughput_of


@pytest.fixture
def artifact(model: str, exported: Callable[..., dict[str, Any]]) -> Path:
    """An exported artifact."""
    return Path(exported(model, "ort", quality=False)["targets"][0]["artifact"])


def test_each_way_of_timing_one_artifact(artifact: Path) -> None:
    """Noise, throughput and roofline are data that JSON can hold, with the figures that their names promise."""
    how = Options(out=artifact, bench_seconds=0.3)
    noise = noise_of(artifact, {"batch": 3}, how, lambda line: None)
    assert noise["sizes"] == {"batch": 3}
    assert (noise["noise"]["detectable"] or 0.0) >= 0 and noise["against"]["itself"]["verdict"] != "faster"
    rows = throughput_of(artifact, [1, 4], how)["throughput"]
    assert [row["batch"] for row in rows] == [1, 4] and all(row["items_per_s"] > 0 for row in rows)
    floor = roofline_of(artifact, {"batch": 2}, how, lambda line: None)["roofline"]
    assert floor["flop"] == 2 * 2 * (8 * 32 + 32 * 4) and floor["floor_ms"] > 0
    assert floor["flops"] == max(floor["peaks"][when]["flops"] for when in ("before", "after"))
    json.dumps([noise, rows, floor], allow_nan=False)


def test_what_cannot_be_timed_that_way(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two at once are a mistake; without its model an artifact has no operations to count."""
    assert run(["bench", str(artifact), str(artifact), "--aa"]) == 2
    assert run(["bench", str(artifact), "--aa", "--batch", "2"]) == 2
    assert run(["bench", str(artifact), "--at", "batch=2", "--batch", "2"]) == 2
    assert "artifact alone" in capsys.readouterr().err
    moved = artifact.with_name("moved")
    shutil.copytree(artifact, moved)
    text = (moved / "artifact.json").read_text()
    (moved / "artifact.json").write_text(text.replace("tiny.py", "gone.py"))
    with pytest.raises(InputRefused, match="must be here"):
        roofline_of(moved, {}, Options(out=moved, bench_seconds=0.1), lambda line: None)

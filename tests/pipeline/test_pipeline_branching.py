"""A model that branches and loops on values, from export to a bundle that replays it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")

from deploytool.artifact import Artifact
from deploytool.bundle.pack import pack
from deploytool.errors import InputRefused

MODEL = Path(__file__).parent.parent / "backends" / "tiny" / "branching.py"


def test_ways_by_value_reach_the_device(exported: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Both targets of TorchScript must pass on every sample, and a bundle replay what passed."""
    report = exported(str(MODEL), "torchscript", "fbgemm")
    results = {result["target"]: result for result in report["targets"]}
    assert {name: result["status"] for name, result in results.items()} == {"torchscript": "ok", "fbgemm": "ok"}
    artifacts = [Artifact.load(Path(result["artifact"])) for result in results.values()]
    assert all(artifact.settings["made_by"] == "script" for artifact in artifacts)
    pack(artifacts, tmp_path / "bundle", name="branching", version="1")
    done = subprocess.run([sys.executable, str(tmp_path / "bundle" / "selftest.py"), "--json"],
                          capture_output=True, text=True, check=False)  # fmt: skip
    variants = json.loads(done.stdout)["variants"]
    assert done.returncode == 0 and {v["status"] for v in variants} == {"passed"} and len(variants) == 2


def test_a_graph_that_cannot_hold_them_is_refused(exported: Callable[..., dict[str, Any]]) -> None:
    """A target that lowers to ONNX must not pass with one way of several; its error has the line, and who takes it."""
    with pytest.raises(InputRefused, match=r"branching\.py:\d+: `if bool") as refused:
        exported(str(MODEL), "ort")
    assert refused.value.code == "DT305" and "choose torchscript or fbgemm" in str(refused.value.fix)

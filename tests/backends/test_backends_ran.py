"""What engines say that they run: every library must tell the same amount of computing, in the precision it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
for package in ("onnxruntime", "onnxscript", "openvino", "nncf", "tensorrt_rtx"):
    pytest.importorskip(package)

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends import ran  # noqa: E402
from deploytool.backends.base import load_checked_target  # noqa: E402
from deploytool.backends.build import build_job  # noqa: E402
from deploytool.backends.ran import Asked, Node, summary  # noqa: E402
from deploytool.cases import read_cases  # noqa: E402
from deploytool.lower.prepare import prepare_job  # noqa: E402
from deploytool.verify.parity import parity_job  # noqa: E402

MODEL = '''
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3, 2, 1)  # as many channels as ONNX Runtime pads to
        self.up, self.down = nn.Linear(256, 96), nn.Linear(96, 10)

    def forward(self, image):
        return {"logits": self.down(self.up(self.conv(image).relu().flatten(1)).relu())}

def build():
    torch.manual_seed(0)
    return Model()

def samples():
    random = torch.Generator().manual_seed(0)
    return [{"image": torch.randn(n, 1, 8, 8, generator=random)} for n in (2, 3, 5)]
'''
CONV = 2 * 2 * 16 * 4 * 4 * 9  # batch, channels, height, width, filter
LINEARS = 2 * 2 * (256 * 96 + 96 * 10)


def what_ran(artifact: Artifact, feeds: Any) -> dict[str, Any] | None:
    """What an artifact's engine tells of one call."""
    with Asked(artifact) as engine:
        engine.run(feeds)
    return engine.ran(feeds)


@pytest.fixture(scope="module")
def ran_by(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """What a target's artifact of the model says, and its folder."""
    root = tmp_path_factory.mktemp("ran")
    (root / "m.py").write_text(MODEL)
    ref = {"kind": "python", "name": "m", "path": str(root / "m.py")}
    (root / "prepared").mkdir()
    prepare_job(ref, str(root / "prepared"), "torchscript", 0)

    def run(name: str) -> tuple[dict[str, Any], Path]:
        folder = root / name
        if not folder.exists():
            folder.mkdir()
            build_job(load_checked_target(name).to_json(), str(root / "prepared"), ref, "x", str(folder), 0)
        feeds = next(read_cases(root / "prepared" / "cases")).inputs
        found = what_ran(Artifact.load(folder, check=False), feeds)
        assert found is not None and "unknown" not in found, found
        return found, folder

    return run


@pytest.mark.parametrize("target", ["torchscript", "ort", "openvino", "trt"])
def test_every_engine_counts_the_same(target: str, ran_by: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    """The flops of the timed case must be those of the layers, whoever tells them; all in the target's precision."""
    found, _ = ran_by(target)
    assert found["flops"] == CONV + LINEARS and found["uncounted"] == []
    assert found["compute_by_precision"] == {"fp16" if target == "trt" else "fp32": 1.0}
    assert found["nodes"] >= 3 and sum(found["nodes_by_precision"].values()) == pytest.approx(1)
    assert found["source"] and json.loads(json.dumps(found)) == found


@pytest.mark.parametrize("target", ["fbgemm", "ort-int8", "openvino-int8"])
def test_int8_shows_only_where_it_runs(target: str, ran_by: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    """A quantized target must show int8 computing, and no more of it than there is computing."""
    found, _ = ran_by(target)
    shares = found["compute_by_precision"]
    assert 0 < shares["int8"] <= 1 and sum(shares.values()) == pytest.approx(1)
    assert found["flops"] == CONV + LINEARS or found["uncounted"]


def test_static_int8_is_int8_throughout(ran_by: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    """The convolution, whose weights the engine packs, is counted, and the last linear is no product of floats."""
    found, _ = ran_by("ort-static-int8")
    assert (found["flops"], found["uncounted"]) == (CONV + LINEARS, [])
    assert found["compute_by_precision"] == {"int8": 1.0}


def test_a_plain_artifact_is_not_taken_for_int8(ran_by: Callable[[str], tuple[dict[str, Any], Path]]) -> None:
    """A manifest that calls itself int8 must not make the engine say so."""
    _, folder = ran_by("ort")
    manifest = json.loads((folder / "artifact.json").read_text())
    lying = Artifact.from_json(folder, {**manifest, "precision": "int8"})
    feeds = next(read_cases(folder.parent / "prepared" / "cases")).inputs
    assert (what_ran(lying, feeds) or {})["compute_by_precision"] == {"fp32": 1.0}


def test_one_session_tells_it(
    ran_by: Callable[[str], tuple[dict[str, Any], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A graph must be opened once to be verified and to tell what runs: opening is most of the cost of a large one."""
    import onnxruntime

    opened: list[str] = []
    real = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: opened.append(str(a[0])) or real(*a, **k))
    for target in ("ort", "ort-int8"):
        _, folder = ran_by(target)
        del opened[:]
        found = parity_job(str(folder), str(folder.parent / "prepared" / "cases"), str(tmp_path / target))
        assert found["ran"]["flops"] == CONV + LINEARS or found["ran"]["uncounted"]
        assert len(opened) == 1, target


def test_parity_tells_it_where_cases_are_kept(
    ran_by: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path
) -> None:
    """The figures of an export must hold it; those of a comparison alone need not."""
    _, folder = ran_by("ort")
    cases = str(folder.parent / "prepared" / "cases")
    assert parity_job(str(folder), cases, str(tmp_path / "golden"))["ran"]["flops"] == CONV + LINEARS
    assert "ran" not in parity_job(str(folder), cases)


def test_an_engine_that_does_not_tell_is_unknown(
    ran_by: Callable[[str], tuple[dict[str, Any], Path]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What keeps a report from being made must be in it; the live module has none."""
    _, folder = ran_by("ort")
    artifact = Artifact.load(folder, check=False)
    monkeypatch.setattr(ran, "_READERS", {"onnx": "deploytool.backends.nowhere"})
    feeds = next(read_cases(folder.parent / "prepared" / "cases")).inputs
    assert "nowhere" in (what_ran(artifact, feeds) or {})["unknown"]
    monkeypatch.setattr(ran, "_READERS", {})
    assert what_ran(artifact, feeds) is None


def test_shares_of_nodes_and_computing() -> None:
    """Shares must follow from the nodes: computing by flops, nodes by number, uncounted products by kind."""
    found = summary([Node("MatMul", "int8", 300), Node("Conv", "fp32", 100, place="XNNPACK"), Node("Add", "fp32"),
                     Node("Gelu", "fp32", 0, fused=True), Node("Einsum", "fp32", None)])  # fmt: skip
    assert found["compute_by_precision"] == {"fp32": 0.25, "int8": 0.75} and found["flops"] == 400
    assert found["nodes_by_precision"] == {"fp32": 0.8, "int8": 0.2} and found["fused"] == 0.2
    assert found["delegated"] == {"XNNPACK": 0.2} and found["uncounted"] == ["Einsum"]
    assert summary([Node("Add", "fp32")])["compute_by_precision"] == {}

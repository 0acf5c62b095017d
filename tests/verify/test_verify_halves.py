"""Judging the nodes of artifacts that compute in 16 bits, beside codes or alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx import numpy_helper  # noqa: E402

from deploytool.backends.base import load_checked_target, nvidia_driver  # noqa: E402
from deploytool.backends.build import build_job  # noqa: E402
from deploytool.lower.prepare import prepare_job  # noqa: E402
from deploytool.verify.bisect import bisect_job  # noqa: E402
from deploytool.verify.nodes import nodes_job  # noqa: E402

pytestmark = pytest.mark.skipif(nvidia_driver(), reason="with a GPU the engine itself is the entry")
MODEL = """
import torch
from torch import nn

INPUTS = {"input": ("batch", 24)}

def build():
    torch.manual_seed(0)
    layers = [nn.Linear(24, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)]
    return nn.Sequential(*layers).eval()

def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"input": torch.randn(batch, 24, generator=generator)} for batch in (1, 2, 5)]
"""
Made = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """Folders of a new artifact of a target, and of what it was prepared from."""
    root = tmp_path_factory.mktemp("halves")
    (root / "m.py").write_text(MODEL)
    ref = {"kind": "python", "name": "m", "path": str(root / "m.py")}
    (root / "prepared").mkdir()
    prepare_job(ref, str(root / "prepared"), "torchscript", 0)

    def make(target: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(target)
        profile: dict[str, Any] = load_checked_target(target).to_json()
        build_job(profile, str(root / "prepared"), ref, "f" * 64, str(folder), 0)
        return folder, root / "prepared"

    return make


def negate(folder: Path) -> str:
    """Turn the sign of a float weight of two dimensions; its name, or "" where there is none."""
    model = onnx.load(folder / "model.onnx")
    weight = next((t for t in model.graph.initializer if len(t.dims) == 2 and t.data_type in (10, 16)), None)
    if weight is None:
        return ""
    weight.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(weight), weight.name))
    onnx.save(model, folder / "model.onnx")
    return str(weight.name)


@pytest.mark.parametrize("target", ["trt-bf16", "trt-int8", "trt-fp8"])
def test_right_nodes_pass(target: str, made: Made) -> None:
    """What bf16, or fp16 between codes, explains must be no fault of any node, and floats must be judged."""
    folder, prepared = made(target)
    judged = nodes_job(str(folder), str(prepared), {})
    assert judged["wrong"] == [] and judged["unjudged"] is None
    assert judged["tensors"] >= 4 and (judged["uncertain"] > 0) is (target != "trt-bf16")


def test_a_wrong_weight_in_bf16_is_named(made: Made) -> None:
    """A weight of the other sign must be found at its node, by the judgement of nodes and by bisection."""
    folder, prepared = made("trt-bf16")
    name = negate(folder)
    assert name
    wrong = nodes_job(str(folder), str(prepared), {})["wrong"]
    assert len(wrong) == 1 and wrong[0]["cause"] != "rounding"
    found = bisect_job(str(folder), str(prepared), {})
    assert (found["found"], found["node"]) == ("node", wrong[0]["node"])


@pytest.mark.parametrize("target", ["trt-int8", "trt-fp8"])
def test_a_wrong_float_beside_codes_is_named(target: str, made: Made) -> None:
    """A wrong scale of a norm between products in codes must be found: what 16 bits explain is far less."""
    folder, prepared = made(target)
    model = onnx.load(folder / "model.onnx")
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    scale = next(t for t in model.graph.initializer if t.name == norm.input[1])
    scale.CopyFrom(numpy_helper.from_array(np.float32(1.1) * numpy_helper.to_array(scale), scale.name))
    onnx.save(model, folder / "model.onnx")
    assert [w["node"] for w in nodes_job(str(folder), str(prepared), {})["wrong"]] == [norm.name]

"""TensorRT engines built on a machine without a GPU."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from workshop import TINY, Workshop

pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

from deploytool.backends.base import build_artifact, load_checked_target, nvidia_driver  # noqa: E402
from deploytool.backends.build import build_job  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused, UsageProblem  # noqa: E402
from deploytool.source import ModelRef  # noqa: E402

pytestmark = pytest.mark.skipif(nvidia_driver(), reason="with a GPU the engine itself is the entry")


def test_the_engine_and_its_graph_are_both_there(workshop: Workshop) -> None:
    """Without a GPU the artifact must hold the engine, say that it was not run, and open the engine's graph."""
    artifact = workshop.artifact("attention", "trt")
    assert not artifact.executes
    assert artifact.settings["not_executed"] == "no NVIDIA driver here"
    assert (artifact.entry, artifact.settings["engine"]) == ("model.onnx", "model.engine")
    assert (artifact.folder / "model.engine").stat().st_size > 10_000
    half = onnx.load(artifact.main_file)
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in half.graph.initializer)


def test_sizes_come_from_the_samples(workshop: Workshop) -> None:
    """Free dimensions must range over the samples' sizes, tuned for the first, unless the profile says otherwise."""
    sizes = workshop.artifact("attention", "trt").settings["profile"]
    assert sizes == {"batch": {"min": 1, "opt": 1, "max": 3}, "length": {"min": 6, "opt": 8, "max": 11}}
    mine = {"batch": {"min": 1, "opt": 4, "max": 64}}
    artifact = build_artifact(workshop.request("attention", load_checked_target("trt"), profile=mine), {})
    assert artifact.settings["profile"]["batch"] == mine["batch"]
    assert "tokens:64x11" in artifact.settings["rebuild"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prepared folder of a model that is calibrated on batches of 7 and 16, with parity taken on 1, 2 and 5."""
    pytest.importorskip("onnxscript")
    from deploytool.lower.prepare import prepare_job

    folder = tmp_path_factory.mktemp("trained")
    prepare_job(asdict(ModelRef("python", "trained", str(TINY / "trained.py"))), str(folder), "torchscript", 0)
    return folder


def test_sizes_hold_calibration_and_parity(trained: Path, tmp_path: Path) -> None:
    """The engine must take every size that parity is taken on, also where calibration has others: tuned for case 0."""
    ref = asdict(ModelRef("python", "trained", str(TINY / "trained.py")))
    built = build_job(load_checked_target("trt").to_json(), str(trained), ref, "f" * 64, str(tmp_path), 0)
    assert built["settings"]["profile"] == {"batch": {"min": 1, "opt": 2, "max": 5}}
    assert "--minShapes=input:1x24 --optShapes=input:2x24 --maxShapes=input:5x24" in built["settings"]["rebuild"]


def test_a_profile_that_leaves_a_case_outside_is_refused(trained: Path, tmp_path: Path) -> None:
    """A size that parity passes and the engine would refuse must be an error that names the dimension and the sizes."""
    target = load_checked_target("trt")
    build = {"profile": {"batch": {"min": 2, "opt": 4, "max": 4}}}
    ref = asdict(ModelRef("python", "trained", str(TINY / "trained.py")))
    with pytest.raises(UsageProblem) as caught:
        build_job({**target.to_json(), "build": build}, str(trained), ref, "f" * 64, str(tmp_path), 0)
    assert caught.value.code == "DT202"
    assert "batch: 2 to 4 leaves out 1, 5" in str(caught.value)


@pytest.mark.parametrize(("usable", "reason"), [(False, "GPU that torch can use"), (True, "must load the engine")])
def test_a_driver_alone_does_not_execute(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, usable: bool, reason: str
) -> None:
    """With a driver but no engine that opens, the artifact must say "not executed" and why, and open the graph."""
    torch = pytest.importorskip("torch")
    backend = importlib.import_module("deploytool.backends.tensorrt")
    monkeypatch.setattr(backend, "nvidia_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    artifact = build_artifact(workshop.request("mlp", load_checked_target("trt")), {})
    assert (artifact.executes, artifact.entry) == (False, "model.onnx")
    assert reason in artifact.settings["not_executed"]
    feeds = workshop.feeds("mlp")[0]
    with backend.BACKEND.open(artifact) as runner:
        assert runner.run(feeds)["output"].shape == (1, 6)


def test_an_engine_that_opens_is_executed(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the engine that was built opens, it must be the entry; the opening is stood in for: no GPU is here."""
    pytest.importorskip("torch")
    opened: list[bytes] = []

    def open_engine(trt: object, log: object, plan: bytes, signature: object) -> nullcontext[None]:
        opened.append(plan)
        return nullcontext()

    backend = importlib.import_module("deploytool.backends.tensorrt")
    monkeypatch.setattr(backend, "nvidia_driver", lambda: True)
    monkeypatch.setattr("deploytool.backends.tensorrt_engine.open_engine", open_engine)
    artifact = build_artifact(workshop.request("mlp", load_checked_target("trt")), {})
    assert (artifact.executes, artifact.entry) == (True, "model.engine")
    assert opened == [artifact.main_file.read_bytes()]
    assert "not_executed" not in artifact.settings


def test_an_unknown_dimension_is_refused(workshop: Workshop) -> None:
    """A size range for a dimension that the model lacks must be an error that names the nearest one."""
    request = workshop.request(
        "attention", load_checked_target("trt"), profile={"batsh": {"min": 1, "opt": 1, "max": 2}}
    )
    with pytest.raises(UsageProblem, match="batsh") as caught:
        build_artifact(request, {})
    assert "'batch'" in str(caught.value)


def test_an_unknown_device_is_refused(workshop: Workshop) -> None:
    """A compute capability that the compiler does not know must be an error that lists those that it knows."""
    target = load_checked_target("trt")
    device = target.device.model_copy(update={"compute_capabilities": ("SM90",)})
    with pytest.raises(UsageProblem, match="SM89"):
        build_artifact(workshop.request("mlp", target.model_copy(update={"device": device})), {})


def test_an_unknown_operator_is_named(workshop: Workshop) -> None:
    """The refusal of an operator must name the operator and the node."""
    request = workshop.request("mlp", load_checked_target("trt").model_copy(update={"precision": "fp32"}))
    assert request.portable is not None
    folder = workshop.folder / "with-dft"
    folder.mkdir()
    x = onnx.helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["batch", 24])
    y = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)
    axes = onnx.numpy_helper.from_array(np.array([2], np.int64), "axes")
    nodes = [onnx.helper.make_node("Unsqueeze", ["input", "axes"], ["u"], name="up"),
             onnx.helper.make_node("DFT", ["u"], ["output"], name="mixing", axis=1)]  # fmt: skip
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], [axes])
    opset = [onnx.helper.make_opsetid("", 18)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), folder / "model.onnx")
    from dataclasses import replace

    portable = replace(request.portable, folder=folder, files=()).save()
    with pytest.raises(InputRefused) as caught:
        build_artifact(replace(request, portable=portable), {})
    assert caught.value.code == "DT310"
    assert "operator DFT, node mixing" in str(caught.value)


def test_a_failed_build_shows_the_compilers_words(workshop: Workshop) -> None:
    """Where the compiler gives no engine, its own log must be in the error: fp32 products do not exist on SM75."""
    target = load_checked_target("trt").model_copy(update={"precision": "fp32"})
    device = target.device.model_copy(update={"compute_capabilities": ("SM75",)})
    with pytest.raises(BackendFailed) as caught:
        build_artifact(workshop.request("mlp", target.model_copy(update={"device": device})), {})
    assert caught.value.code == "DT504"
    assert "SM75" in str(caught.value)

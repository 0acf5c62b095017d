"""TensorRT engines built on a machine without a GPU."""

from __future__ import annotations

import numpy as np
import pytest
from workshop import Workshop

pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")

from deploytool.backends.base import build_artifact, load_checked_target, nvidia_driver  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused, UsageProblem  # noqa: E402

pytestmark = pytest.mark.skipif(nvidia_driver(), reason="with a GPU the engine itself is the entry")


def test_the_engine_and_its_graph_are_both_there(workshop: Workshop) -> None:
    """Without a GPU the artifact must hold the engine, say that it was not run, and open the engine's graph."""
    artifact = workshop.artifact("attention", "trt")
    assert not artifact.executes
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

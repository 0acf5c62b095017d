"""ONNX Runtime's fp16 graphs and its own file format."""

from __future__ import annotations

import numpy as np
import pytest
from workshop import Workshop, cosine

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.cut import open_cuts  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.errors import InputRefused  # noqa: E402


def test_fp16_halves_the_file_and_keeps_the_types(workshop: Workshop) -> None:
    """The weights must be fp16, inputs and outputs as the signature says, and the operators that are named fp32."""
    plain, half = workshop.artifact("mlp", "ort"), workshop.artifact("mlp", "ort-fp16")
    assert half.main_file.stat().st_size < 0.6 * plain.main_file.stat().st_size
    graph = onnx.load(half.main_file).graph
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    request = workshop.request("mlp", load_checked_target("ort-fp16"), fp32_ops=["Gemm"])
    kept = onnx.load(build_artifact(request, {}).main_file).graph
    assert not any(t.data_type == onnx.TensorProto.FLOAT16 and len(t.dims) == 2 for t in kept.initializer)


def test_what_an_fp16_graph_ran_is_asked(workshop: Workshop) -> None:
    """The report must tell the share of the computing from the engine, not from the profile."""
    with Asked(workshop.artifact("mlp", "ort-fp16")) as engine:
        engine.run(workshop.feeds("mlp")[0])
    shares = (engine.ran(workshop.feeds("mlp")[0]) or {})["compute_by_precision"]
    assert sum(shares.values()) == pytest.approx(1) and set(shares) <= {"fp16", "fp32"}


@pytest.mark.parametrize("name", ["ort", "ort-static-int8", "ort-weight-int8"])
def test_the_own_format_gives_the_same(workshop: Workshop, name: str) -> None:
    """`model.ort` must stand alone beside its operators, open by itself, and be as near as the profile says."""
    target = load_checked_target(name)
    artifact = build_artifact(workshop.request("attention", target, format="ort"), {})
    assert artifact.entry == "model.ort" and artifact.settings["saved"] == "extended"
    assert {entry.path for entry in artifact.files} == {"model.ort", "required_operators.config"}
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("attention"):
            reference = workshop.reference("attention", feeds)
            for key, array in runner.run(feeds).items():
                assert cosine(array, reference[key]) >= target.parity.cosine_min


def test_the_operators_are_those_of_the_graph(workshop: Workshop) -> None:
    """The file must name operators of the optimized graph by domain and opset, and no folder of this machine."""
    artifact = build_artifact(workshop.request("mlp", load_checked_target("ort"), format="ort"), {})
    text = (artifact.folder / "required_operators.config").read_text()
    rows = {domain: names.split(",") for domain, _, names in (line.split(";") for line in text.splitlines())}
    assert {"Gemm"} <= set(rows["ai.onnx"]) or {"FusedGemm"} <= set(rows["com.microsoft"])
    assert str(artifact.folder) not in text


def test_its_graph_cannot_be_bisected(workshop: Workshop) -> None:
    """Finding the first wrong node in a file without a readable graph must be refused with what to do."""
    artifact = build_artifact(workshop.request("mlp", load_checked_target("ort"), format="ort"), {})
    with pytest.raises(InputRefused, match="onnx") as caught:
        open_cuts(artifact, artifact.folder, {})
    assert caught.value.code == "DT313"


def test_tensorrt_int8_is_calibrated(workshop: Workshop) -> None:
    """A model without learned grids must become int8 by ranges around zero, built, and near eager on its graph."""
    pytest.importorskip("tensorrt_rtx")
    target = load_checked_target("trt").model_copy(update={"precision": "int8"})
    device = target.device.model_copy(update={"compute_capabilities": ("SM86", "SM89")})
    for source, least in (("conv", 0.99), ("attention", 0.99)):
        artifact = build_artifact(workshop.request(source, target.model_copy(update={"device": device})), {})
        assert artifact.settings["scheme"] == "static" and (artifact.folder / "model.engine").stat().st_size > 1000
        zeros = [t for t in onnx.load(artifact.folder / "model.onnx").graph.initializer if t.name.endswith(":zero")]
        assert zeros and not any(np.any(onnx.numpy_helper.to_array(zero)) for zero in zeros)
        if artifact.executes:
            continue
        with open_artifact(artifact) as runner:
            for feeds in workshop.feeds(source):
                reference = workshop.reference(source, feeds)
                assert all(cosine(array, reference[key]) > least for key, array in runner.run(feeds).items())

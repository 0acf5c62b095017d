"""Static int8 in an ONNX graph: ranges, Q/DQ pairs, and what stays fp32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop, cosine

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact  # noqa: E402
from deploytool.backends.onnx_qdq import Scheme, quantizable, ranges_needed, write_qdq  # noqa: E402
from deploytool.backends.onnx_ranges import Activations, Histogram, entropy, percentile  # noqa: E402
from deploytool.errors import InputRefused, UsageProblem  # noqa: E402

RANDOM = np.random.default_rng(0)


def graph(nodes: list[Any], constants: dict[str, np.ndarray], shape: list[Any], *domains: str) -> Any:
    """A model of one float input x and one output y."""
    return helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)],
        ir_version=9,
    )  # fmt: skip


def run(model: Any, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def quantized(model: Any, x: np.ndarray, scheme: Scheme = Scheme(7)) -> Any:  # noqa: B008 - frozen
    nodes = quantizable(model, ("MatMul", "Conv"))
    ranges = Activations(model, sorted(ranges_needed(model, nodes, scheme)), [{"x": x}]).ranges("min-max")
    return write_qdq(model, nodes, ranges, scheme)


def histogram(values: np.ndarray) -> Histogram:
    seen = Histogram(float(values.min()), float(values.max()), np.zeros(2048, np.int64))
    seen.add(values)
    return seen


@pytest.mark.parametrize("method", ["auto", "min-max", "percentile", "entropy"])
@pytest.mark.parametrize("source", ["conv", "attention"])
def test_every_calibration_is_near_eager(workshop: Workshop, source: str, method: str) -> None:
    """Feeds of several shapes must calibrate by every method, and the result must keep to the profile's cosine."""
    target = load_checked_target("ort-static-int8")
    artifact = build_artifact(workshop.request(source, target, calibration=method), {})
    assert artifact.settings["calibration"] == method or method == "auto"
    assert sum(artifact.settings["int8"].values()) >= 2
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds(source):
            reference = workshop.reference(source, feeds)
            for key, array in runner.run(feeds).items():
                assert cosine(array, reference[key]) >= target.parity.cosine_min


def test_auto_takes_the_calibration_that_loses_least(workshop: Workshop) -> None:
    """The loss on the feeds that "auto" records must be the least of the three methods'."""
    target = load_checked_target("ort-static-int8")
    losses = {method: build_artifact(workshop.request("mlp", target, calibration=method), {}).settings
              for method in ("auto", "min-max", "percentile", "entropy")}  # fmt: skip
    auto = losses.pop("auto")
    assert auto["calibration_loss"] == min(one["calibration_loss"] for one in losses.values())


def test_outliers_are_cut_off() -> None:
    """Of a normal distribution with one huge value, percentile and entropy must leave the huge one out of the range."""
    values = np.append(RANDOM.standard_normal(1_000_000), 100.0)
    for chosen in (percentile, entropy):
        low, high = chosen(histogram(values))
        assert -8 < low < -2.5, chosen
        assert 2.5 < high < 20, chosen


def test_even_values_are_not_cut_off() -> None:
    """Where every value is equally frequent, all must stay within the range."""
    low, high = entropy(histogram(RANDOM.uniform(-3, 5, 500_000)))
    assert (low, high) == (pytest.approx(-3, abs=0.01), pytest.approx(5, abs=0.05))


def test_only_the_products_read_rounded_values() -> None:
    """A residual sum beside a product must keep the floats: one product alone must differ from the exact graph."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
             helper.make_node("Add", ["x", "h"], ["y"], name="residual")]  # fmt: skip
    model = graph(nodes, {"w": np.zeros((8, 8), np.float32)}, ["n", 8])
    x = RANDOM.standard_normal((5, 8)).astype(np.float32)
    assert np.array_equal(run(quantized(model, x), x), x)


def test_convolutions_give_int8_to_each_other() -> None:
    """Convolution, bias and ReLU must become one int8 node each, near the exact graph, with nothing left in float."""
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["h"], name="first", pads=[1, 1, 1, 1]),
             helper.make_node("Relu", ["h"], ["r"], name="relu"),
             helper.make_node("Conv", ["r", "v"], ["y"], name="second")]  # fmt: skip
    constants = {"w": RANDOM.standard_normal((4, 2, 3, 3)), "b": RANDOM.standard_normal(4),
                 "v": RANDOM.standard_normal((3, 4, 3, 3))}  # fmt: skip
    model = graph(nodes, {name: value.astype(np.float32) for name, value in constants.items()}, ["n", 2, 9, 9])
    x = RANDOM.standard_normal((2, 2, 9, 9)).astype(np.float32)
    result = quantized(model, x)
    assert cosine(run(result, x), run(model, x)) > 0.999
    assert not any(t.data_type == TensorProto.FLOAT and len(t.dims) == 4 for t in result.graph.initializer)


def test_engines_fuse_convolutions(tmp_path: Path) -> None:
    """ONNX Runtime must run the convolutions of a static graph as its own int8 ones."""
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["h"], name="first"),
             helper.make_node("Relu", ["h"], ["r"], name="relu"),
             helper.make_node("Conv", ["r", "v"], ["y"], name="second")]  # fmt: skip
    constants = {"w": np.ones((4, 2, 3, 3), np.float32), "b": np.ones(4, np.float32),
                 "v": np.ones((3, 4, 1, 1), np.float32)}  # fmt: skip
    model = graph(nodes, constants, ["n", 2, 9, 9])
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    result = quantized(model, RANDOM.standard_normal((2, 2, 9, 9)).astype(np.float32))
    ort.InferenceSession(result.SerializeToString(), options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2
    assert not {"Conv", "Relu"} & set(kinds)


def test_a_silent_channel_keeps_its_bias() -> None:
    """A channel whose weights are all zero must give its bias, which must fit the int32 of its grid."""
    nodes = [helper.make_node("Conv", ["x", "w", "b"], ["y"], name="conv")]
    weight = RANDOM.standard_normal((2, 1, 1, 1)).astype(np.float32)
    weight[1] = 0
    model = graph(nodes, {"w": weight, "b": np.array([0.5, 3e3], np.float32)}, ["n", 1, 4, 4])
    x = RANDOM.standard_normal((1, 1, 4, 4)).astype(np.float32)
    np.testing.assert_allclose(run(quantized(model, x), x)[:, 1], 3e3, rtol=0.01)


def test_symmetric_graphs_have_no_zero_points() -> None:
    """What TensorRT is given must hold int8 activations around zero."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    weight = RANDOM.standard_normal((8, 8)).astype(np.float32)
    x = RANDOM.standard_normal((5, 8)).astype(np.float32) + 3
    model = graph(nodes, {"w": weight}, ["n", 8])
    result = quantized(model, x, Scheme(8, symmetric=True))
    zeros = [numpy_helper.to_array(t) for t in result.graph.initializer if t.name.endswith(":zero")]
    assert zeros and all(zero.dtype == np.int8 and not zero.any() for zero in zeros)
    assert cosine(run(result, x), run(model, x)) > 0.999


@pytest.mark.parametrize(("target", "operator"), [("ort-static-int8", "MatMul"), ("ort-int8", "MatMulInteger")])
def test_a_fused_graph_is_taken(workshop: Workshop, target: str, operator: str) -> None:
    """A graph with operators that are not of ONNX's own must quantize: no type of a tensor is inferred."""
    request = workshop.request("mlp", load_checked_target(target))
    assert request.portable is not None
    folder = workshop.folder / f"fused-{target}"
    folder.mkdir()
    names = {"x": "input", "y": "output"}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
             helper.make_node("BiasGelu", ["h", "b"], ["g"], name="gelu", domain="com.microsoft"),
             helper.make_node("MatMul", ["g", "v"], ["y"], name="second")]  # fmt: skip
    constants = {"w": RANDOM.standard_normal((24, 16)), "b": np.zeros(16), "v": RANDOM.standard_normal((16, 6))}
    model = graph(nodes, {n: value.astype(np.float32) for n, value in constants.items()}, ["n", 24], "com.microsoft")
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    model.graph.input[0].name, model.graph.output[0].name = "input", "output"
    onnx.save(model, folder / "model.onnx")
    portable = replace(request.portable, folder=folder, files=()).save()
    assert build_artifact(replace(request, portable=portable), {}).settings["int8"] == {operator: 2}


def test_sensitive_products_stay_fp32(workshop: Workshop) -> None:
    """As many products as the profile says must stay fp32, which must lose less; unknown names are refused."""
    target = load_checked_target("ort-static-int8")
    losses = []
    for keep in (0, 6):
        settings = build_artifact(workshop.request("attention", target, keep_fp32=keep), {}).settings
        assert len(settings["kept_fp32"]) == keep
        losses.append(settings["calibration_loss"])
    assert losses[1] < losses[0]
    with pytest.raises(UsageProblem, match="exclude"):
        build_artifact(workshop.request("attention", target, exclude=["/nowhere"]), {})


def test_nothing_left_to_quantize_is_refused(workshop: Workshop) -> None:
    """A profile that keeps every product in fp32 must not give an int8 artifact."""
    target = load_checked_target("ort-static-int8")
    with pytest.raises(InputRefused) as caught:
        build_artifact(workshop.request("mlp", target, keep_fp32=3), {})
    assert caught.value.code == "DT310"


def test_static_takes_no_other_operators(workshop: Workshop) -> None:
    """An operator that static int8 does not know must be an error of the profile."""
    with pytest.raises(UsageProblem, match="op_types"):
        build_artifact(workshop.request("mlp", load_checked_target("ort-static-int8"), op_types=["LSTM"]), {})

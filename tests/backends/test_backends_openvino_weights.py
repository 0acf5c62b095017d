"""Weights in 8 and 4 bits for OpenVINO."""

from __future__ import annotations

import numpy as np
import pytest
from workshop import Workshop, cosine

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov
from openvino import opset13

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.openvino_weights import stored_bits, turn_weights, widest_group
from deploytool.errors import UsageProblem


@pytest.mark.parametrize("method", ["plain", "scale-estimation", "awq", "gptq"])
def test_four_bits_agree_by_every_method(workshop: Workshop, method: str) -> None:
    """Methods that read calibration feeds must not ruin a graph that came from ONNX, and weights must be 4-bit."""
    request = workshop.request("attention", load_checked_target("openvino-int4"), method=method, group_size=16)
    artifact = build_artifact(request, {})
    assert artifact.precision == "int4" and artifact.settings["weight_elements"]["int4"] > 10_000
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("attention"):
            reference = workshop.reference("attention", feeds)
            assert all(cosine(got, reference[name]) > 0.95 for name, got in runner.run(feeds).items())


def test_awq_tells_what_it_did(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The products that AWQ scaled are counted as NNCF chooses them; where there are none, it is said."""
    pytest.importorskip("transformers")
    from nncf.quantization.algorithms.weight_compression.awq import AWQ

    chosen: list[int] = []
    real = AWQ._get_awq_data
    monkeypatch.setattr(AWQ, "_get_awq_data", lambda *a: [found := real(*a), chosen.append(len(found))][0])
    told = []
    for name in ("decoder", "attention"):
        request = workshop.request(name, load_checked_target("openvino-int4"), method="awq", group_size=16)
        told.append(build_artifact(request, {}).settings)
    assert [settings["awq_products"] for settings in told] == chosen and chosen[0] > 0 == chosen[1]
    assert "note" not in told[0] and "nothing to do" in told[1]["note"]


def test_eight_bits_are_closer_than_four(workshop: Workshop) -> None:
    """8-bit weights must be stored in 8 bits, be smaller than fp32 and closer to the model than 4-bit ones."""
    feeds = workshop.feeds("attention")[0]
    reference = workshop.reference("attention", feeds)["hidden"]
    close = {}
    for name in ("openvino-weight-int8", "openvino-int4"):
        artifact = workshop.artifact("attention", name)
        with open_artifact(artifact) as runner:
            close[name] = cosine(runner.run(feeds)["hidden"], reference)
    eight = workshop.artifact("attention", "openvino-weight-int8")
    assert eight.settings["weight_elements"]["int8"] > 10_000
    assert eight.size_bytes < workshop.artifact("attention", "openvino").size_bytes
    assert close["openvino-weight-int8"] > max(0.999, close["openvino-int4"])


def test_activations_are_rounded_in_the_widest_groups(workshop: Workshop) -> None:
    """The group must divide every product's width and be what the engine is told; 0 must leave activations alone."""
    widest = workshop.artifact("attention", "openvino-dynamic-int8")
    group = widest.settings["activation_group"]
    compiled = ov.Core().compile_model(widest.main_file, "CPU")
    assert group >= 16 and group == compiled.get_property("DYNAMIC_QUANTIZATION_GROUP_SIZE")
    request = workshop.request("attention", load_checked_target("openvino-weight-int8"), activation_group=0)
    exact = build_artifact(request, {})
    feeds = workshop.feeds("attention")[1]
    reference = workshop.reference("attention", feeds)["hidden"]
    with open_artifact(exact) as floating, open_artifact(widest) as rounded:
        apart = [float(np.abs(one.run(feeds)["hidden"] - reference).max()) for one in (floating, rounded)]
    assert apart[0] <= apart[1] < 0.1 * float(np.abs(reference).max())


@pytest.mark.parametrize("target", ["openvino", "openvino-int8"])
def test_rounding_of_activations_needs_weights_that_are_packed(workshop: Workshop, target: str) -> None:
    """Where the option would do nothing it is refused."""
    request = workshop.request("attention", load_checked_target(target), activation_group=32)
    with pytest.raises(UsageProblem, match="weights_only") as caught:
        build_artifact(request, {})
    assert caught.value.code == "DT202"


def test_widths_without_a_common_group_are_left_to_the_engine() -> None:
    """Products of 24 and 40 numbers share groups of 8 only: none is asked for. A product of two inputs has no say."""
    wide, narrow = (opset13.constant(np.ones((4, width), np.float32)) for width in (24, 40))
    inputs = [opset13.parameter([-1, width], np.float32) for width in (24, 40, 7)]
    products = [opset13.matmul(x, w, False, True) for x, w in zip(inputs, (wide, narrow), strict=False)]
    both = opset13.matmul(inputs[2], inputs[2], True, False)
    assert widest_group(ov.Model([*products, both], inputs, "narrow")) is None
    assert widest_group(ov.Model([products[0], both], [inputs[0], inputs[2]], "wide")) == 24


def test_widths_that_no_group_divides_still_work(workshop: Workshop) -> None:
    """A group size that does not divide the width must give smaller groups or 8 bits, and a right model."""
    request = workshop.request("attention", load_checked_target("openvino-int4"), method="plain", group_size=24)
    artifact = build_artifact(request, {})
    feeds = workshop.feeds("attention")[1]
    with open_artifact(artifact) as runner:
        assert cosine(runner.run(feeds)["pooled"], workshop.reference("attention", feeds)["pooled"]) > 0.95


def test_turned_weights_compute_the_same(workshop: Workshop) -> None:
    """Turning weights must change every [in, out] constant of a product and no output."""
    model = ov.Core().read_model(workshop.portable("attention").main_file)
    feeds = workshop.feeds("attention")[2]
    before = {o.any_name: a for o, a in ov.compile_model(model, "CPU")(dict(feeds)).items()}
    assert turn_weights(model) > 5 and turn_weights(model) == 0
    assert set(stored_bits(model)) <= {"float", "other", "int8"}
    for output, array in ov.compile_model(model, "CPU")(dict(feeds)).items():
        np.testing.assert_allclose(array, before[output.any_name], atol=1e-5)

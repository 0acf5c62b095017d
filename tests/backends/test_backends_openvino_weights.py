"""Weights in 8 and 4 bits for OpenVINO."""

from __future__ import annotations

import numpy as np
import pytest
from workshop import Workshop, cosine

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov

from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.openvino_weights import stored_bits, turn_weights


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

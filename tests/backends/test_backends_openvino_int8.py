"""Static int8 in OpenVINO: which scheme is taken."""

from __future__ import annotations

from typing import Any

import pytest
from workshop import Workshop

pytest.importorskip("openvino")
pytest.importorskip("nncf")

from deploytool.backends import openvino_int8, sensitivity
from deploytool.backends.base import build_artifact, load_checked_target
from deploytool.errors import BackendFailed


@pytest.mark.parametrize(("losses", "tried", "taken"), [
    ({"plain": 0.001}, ["plain"], "plain"),
    ({"plain": 0.05, "transformer": 0.001}, ["plain", "transformer"], "transformer"),
    ({"plain": 0.03, "transformer": 0.05, "unsmoothed": 0.04}, ["plain", "transformer", "unsmoothed"] * 2, "plain"),
])  # fmt: skip
def test_convolutions_get_the_scheme_that_loses_less(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, losses: dict[str, float], tried: list[str], taken: str
) -> None:
    """Without attention, plain int8 must do where it is good enough, else what loses less, with all ranges tried."""
    seen: list[str] = []
    real = openvino_int8._quantize

    def quantize(*arguments: Any) -> Any:
        seen.append(arguments[3])
        return real(*arguments)

    monkeypatch.setattr(openvino_int8, "_quantize", quantize)
    monkeypatch.setattr(sensitivity, "sample_loss", lambda reference, outputs: losses[seen[-1]])
    artifact = build_artifact(workshop.request("conv", load_checked_target("openvino-int8")), {})
    assert (seen, artifact.settings["scheme"]) == (tried, taken)


def test_a_scheme_that_the_engine_refuses_is_passed_over(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenVINO does not compile Fourier mixing with all of it in int8: the other scheme is taken, which it does."""
    real = openvino_int8._outputs
    asked: list[str] = []

    def outputs(model: Any, feeds: Any, what: str = "graph") -> Any:
        asked.append(what)
        if asked.count(openvino_int8._QUANTIZED) == 1 and what == openvino_int8._QUANTIZED:
            raise BackendFailed("DT504", "it must compile")
        return real(model, feeds, what)

    monkeypatch.setattr(openvino_int8, "_outputs", outputs)
    artifact = build_artifact(workshop.request("conv", load_checked_target("openvino-int8")), {})
    assert artifact.settings["scheme"] == "transformer" and asked.count(openvino_int8._QUANTIZED) == 2

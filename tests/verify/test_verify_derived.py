"""Limits from the reference's own noise: tighter than the profile where the model is steady, and never looser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.difference import Difference, error_max
from deploytool.signature import Signature
from deploytool.target import Limits
from deploytool.verify.derived import arithmetic, derived_limits
from deploytool.verify.judge import judge_parity

LIMITS = Limits(cosine_min=0.98)


def of(precision: str, **figures: float) -> dict[str, Any]:
    return derived_limits({"outputs": {"y": figures}}, precision, LIMITS)["y"]


@pytest.mark.parametrize(
    ("precision", "figures", "expected", "word"),
    [
        ("fp32", {"fp64": 1e-5, "shuffled": 2e-5}, 3.2e-4, "16 times the reference's own noise"),
        ("fp32", {"fp64": 1e-9}, 512 * 2.0**-24, "the least for fp32"),
        ("fp32", {"fp64": 0.1}, error_max(0.98), "the profile's cosine_min, less than 16 times"),
        ("fp16", {"fp16": 2e-3, "int8": 1.0}, 1.6e-2, "rounded to half precision"),
        ("int8", {"int8": 0.02}, 0.12, "7-bit weights"),
        ("int8", {"fp64": 1e-6}, error_max(0.98), "is not known"),
        ("int4", {"int8": 0.02}, error_max(0.98), "none is simulated for int4"),
    ],
)
def test_limits_say_where_they_come_from(
    precision: str, figures: dict[str, float], expected: float, word: str
) -> None:
    """The limit must follow from the noise within its least and the profile's, and the sentence name the source."""
    limit = of(precision, **figures)
    assert limit["relative_error_max"] == pytest.approx(expected) and word in limit["from"]


def test_a_small_error_of_a_steady_model_fails() -> None:
    """What the profile lets pass must fail where the model itself is far steadier, by a sentence with the source."""
    a = np.random.default_rng(0).standard_normal((4, 9)).astype(np.float32)
    difference = Difference("y", True)
    difference.add(0, a, a + np.float32(1e-3) * a[:, ::-1])
    parity: dict[str, Any] = {"cases": 1, "outputs": {"y": difference.summary()}}
    assert judge_parity(parity, LIMITS) == []
    parity["derived"] = derived_limits({"outputs": {"y": {"fp64": 1e-7, "shuffled": 2e-7}}}, "fp32", LIMITS)
    (sentence,) = judge_parity(parity, LIMITS)
    assert "relative error must be at most 3.05e-05" in sentence and "double precision (1e-07)" in sentence


def test_without_noise_the_profile_alone_judges() -> None:
    """A model that has no module, or no noise that could be measured, must be held to its profile."""
    assert derived_limits(None, "fp32", LIMITS) == {}
    assert of("fp32")["relative_error_max"] == error_max(0.98)
    assert "none is simulated for static int8" in of("static int8", int8=0.01)["from"]
    noise = {"outputs": {"y": {"shuffled": 1e-7}}, "skipped": {"fp16": "it is too large"}}
    assert derived_limits(noise, "fp16", LIMITS)["y"]["from"].endswith("noise: it is too large")


def test_learned_grids_are_held_to_the_eased_profile(tmp_path: Path) -> None:
    """A number between two codes may fall to either: noise in which none did must not be the limit."""
    artifact = Artifact(tmp_path, "openvino", "f", "e", "fp32", Signature((), ()), settings={"input_grids": 3})
    noise = {"outputs": {"y": {"fp64": 1e-7, "shuffled": 1e-7}}}
    limits = Limits(cosine_min=0.99999).beside_grids()
    assert limits.cosine_min == 0.999
    found = derived_limits(noise, arithmetic(artifact), limits)["y"]
    assert found["relative_error_max"] == error_max(0.999) and found["noise"] is None


@pytest.mark.parametrize(
    ("backend", "name", "settings", "expected"),
    [
        ("fbgemm", "fbgemm", {"scheme": "static"}, "static int8"),  # as the profile's "auto" chose for this model
        ("fbgemm", "no-static-ranges", {"scheme": "dynamic"}, "int8"),
        ("onnxruntime", "ort-int8", {}, "int8"),
        ("openvino", "openvino-int8", {"scheme": "transformer"}, "static int8"),
        ("openvino", "openvino-dynamic-int8", {"weights_only": True, "activation_group": 64}, "int8"),
    ],
)
def test_static_ranges_are_told_by_the_engine(
    backend: str, name: str, settings: dict[str, str], expected: str, tmp_path: Path
) -> None:
    """What was built decides whether the noise of dynamic int8 speaks of it, not what its profile is called."""
    artifact = Artifact(tmp_path, backend, "f", "e", "int8", Signature((), ()), target={"name": name},
                        settings=settings)  # fmt: skip
    assert arithmetic(artifact) == expected

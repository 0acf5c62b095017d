"""What a report says of an artifact beside its figures."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from deploytool.artifact import Artifact
from deploytool.pipeline.findings import findings_of
from deploytool.signature import Signature
from deploytool.target import load_target


@dataclass
class Prepared:
    """A prepared model of which there is nothing to say."""

    notes: tuple[str, ...] = ()
    info: dict[str, Any] = field(
        default_factory=lambda: {"synthetic": False, "notes": [], "fast_path": None, "encodings": {"of": 0}}
    )


def said(
    name: str, shares: dict[str, float], *, nodes: dict[str, float] | None = None, info: dict[str, Any] | None = None,
    **settings: Any,
) -> list[str]:  # fmt: skip
    """The findings of an artifact of a target that runs with these shares, of a model with this `info`."""
    target = load_target(name)
    ran = {"compute_by_precision": shares, "nodes_by_precision": nodes or {"fp32": 1.0}, "uncounted": ["QLinearConv"],
           "source": "a profiler"}  # fmt: skip
    artifact = Artifact(
        folder=Path("x"), backend=target.backend, format="onnx", entry="model.onnx", precision=target.precision,
        executes=True, signature=Signature((), ()), target=target.to_json(), model={}, history=(),
        settings={"ran": ran, **settings},
    )  # fmt: skip
    prepared = Prepared()
    return findings_of(target, artifact, replace(prepared, info=prepared.info | (info or {})))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ort-static-int8", "fbgemm", "openvino-int8", "ort-fp16", "trt-fp8"])
def test_low_precision_that_does_not_run_is_told(name: str) -> None:
    """Where nothing computes in what was asked for, it is said, with what is not counted and what to take."""
    (sentence,) = said(name, {"fp32": 0.997, "other": 0.002, "int8": 0.001})
    assert "0.1% of the computing" in sentence and "not counted: QLinearConv" in sentence
    plain = load_target(name).plain
    assert plain is None or f"{plain} computes the same without the loss" in sentence
    assert said(name, {"fp32": 0.9, "int8": 0.1}) == []


def test_where_there_are_no_products_nodes_tell() -> None:
    """Without a counted product the share of the nodes decides."""
    assert "0.0% of the nodes" in said("ort-int8", {}, nodes={"fp32": 0.5, "other": 0.5})[0]
    assert said("ort-int8", {}, nodes={"fp32": 0.5, "int8": 0.5}) == []


def test_fp32_and_weights_alone_may_compute_in_fp32() -> None:
    """Nothing is said of fp32 targets, nor of those that round weights alone, nor where the engine tells nothing."""
    assert said("ort", {"fp32": 1.0}) == []
    assert said("openvino-weight-int8", {"fp32": 1.0}, weights_only=True) == []
    assert "0.0% of the" in said("openvino-dynamic-int8", {"fp32": 1.0}, weights_only=True, activation_group=64)[0]
    assert said("ort-int4", {"low-bit weights": 1.0}) == []
    assert said("fbgemm", {}, ran={"unknown": "no profiler"}) == []


def test_a_backends_note_is_a_finding() -> None:
    """What a backend could not do is in the report, not in the settings alone."""
    assert said("fbgemm", {"int8": 1.0}, note="projections stay fp32") == ["projections stay fp32"]


def test_what_a_script_holds_is_a_finding() -> None:
    """What was compiled, and which lines a trace holds fixed, is in the report."""
    assert "compiled chooser" in said("torchscript", {"fp32": 1.0}, made_by="script", scripted=["chooser"])[0]
    assert "the whole model" in said("torchscript", {"fp32": 1.0}, made_by="script", scripted=[""])[0]
    (sentence,) = said("torchscript", {"fp32": 1.0}, made_by="trace", fixed_by_trace=["a.py:3: `if x:`", "a.py:7: `y`"])
    assert "lines: 2" in sentence and "a.py:3: `if x:`" in sentence
    assert said("torchscript", {"fp32": 1.0}, made_by="trace") == []
    both = said("torchscript", {"fp32": 1.0}, made_by="script", scripted=["chooser"], fixed_by_trace=["a.py:3: `if`"])
    assert "compiled chooser" in both[0] and "lines: 1" in both[1]


def test_what_is_to_be_said_of_the_model_is_told() -> None:
    """Whatever the target, the notes of the model that was opened must be findings."""
    for target in ("ort", "openvino"):
        assert said(target, {"fp32": 1.0}, info={"notes": ["the checker did not know it"]}) == [
            "the checker did not know it"]  # fmt: skip


def test_the_fast_paths_failure_and_figures_are_both_told() -> None:
    """A case that fails on torch's fast path must not hide how far the others are, nor they it."""
    far = {"cases": 3, "of": 8, "outputs": ["y"], "largest": 0.25, "failed": None}
    none = {"cases": 0, "of": 8, "outputs": [], "largest": 0.0, "failed": "it fails: nested"}
    for found, words in ((far, ("(by up to 0.25 of the largest output, in 3 of 8 cases: y)",)),
                         (none, ("(it fails: nested)",)),
                         (far | {"failed": "it fails: nested"}, ("0.25", "3 of 8", "it fails: nested"))):  # fmt: skip
        (sentence,) = said("ort", {"fp32": 1.0}, info={"fast_path": found})
        assert all(word in sentence for word in words)

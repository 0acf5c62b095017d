"""Settings of ONNX Runtime's sessions travel with the artifact."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import onnx
import pytest
from workshop import Workshop

from deploytool.artifact import Artifact
from deploytool.backends import onnxruntime, ort_generate
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.errors import UsageProblem


def test_session_settings_are_part_of_the_artifact(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the profile says of the session is what an artifact from disk is opened with."""
    build = {"without": ["SkipLayerNormFusion"], "arena": False, "flush": True, "optimization": "extended"}
    artifact = build_artifact(workshop.request("attention", load_checked_target("ort"), **build), {})
    seen = {}
    real = onnxruntime.open_session
    monkeypatch.setattr(onnxruntime, "open_session", lambda *a, **k: seen.update(k, level=a[2]) or real(*a, **k))
    with open_artifact(Artifact.load(artifact.folder)) as runner:
        feeds = workshop.feeds("attention")[0]
        reference = workshop.reference("attention", feeds)
        for name, array in runner.run(feeds).items():
            np.testing.assert_allclose(array, reference[name], rtol=1e-4, atol=1e-5)
    assert (seen["without"], seen["arena"], seen["flush"]) == (["SkipLayerNormFusion"], False, True)
    assert seen["level"] == "extended"


def test_the_shipped_runner_opens_it_alike(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script beside a language model must open its graph with every setting of the session, as deploytool does."""
    build = {"without": ["MatMulAddFusion"], "arena": False, "optimization": "basic"}
    artifact = build_artifact(workshop.request("mlp", load_checked_target("ort"), **build), {})
    seen: dict[str, Any] = {}

    def opened(path: str, options: Any, **named: Any) -> Any:
        seen.update(named, level=options.graph_optimization_level, arena=options.enable_cpu_mem_arena)
        return real(path, options, **named)

    real = ort_generate.ort.InferenceSession
    monkeypatch.setattr(ort_generate.ort, "InferenceSession", opened)
    ort_generate.open_model(artifact.folder)
    shipped = dict(seen)
    open_artifact(artifact)
    assert shipped == seen and seen["disabled_optimizers"] == ["MatMulAddFusion"]


def denormal_sum(flush: bool) -> bool:
    """Whether 1e-40 + 1e-40 is anything (in a process of its own: the first session decides for all of a process)."""
    value = {name: onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [4]) for name in "xy"}
    graph = onnx.helper.make_graph([onnx.helper.make_node("Add", ["x", "x"], ["y"])], "sum", [value["x"]], [value["y"]])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    session = onnxruntime.open_session(model.SerializeToString(), 1, flush=flush)
    return bool(session.run(None, {"x": np.full(4, 1e-40, np.float32)})[0].any())


def test_denormals_are_flushed_where_asked() -> None:
    """With `flush` a denormal number counts as zero, without it does not."""
    for flush in (False, True):
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert pool.submit(denormal_sum, flush).result(timeout=60) is not flush


def test_unknown_precision_is_refused(workshop: Workshop) -> None:
    """A precision that the backend lacks is an error that names those that it has."""
    target = load_checked_target("ort").model_copy(update={"precision": "bf16"})
    with pytest.raises(UsageProblem, match="fp32, fp16, int8 or int4"):
        build_artifact(workshop.request("mlp", target), {})

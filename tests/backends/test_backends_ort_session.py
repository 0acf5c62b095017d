"""Settings of ONNX Runtime's sessions travel with the artifact."""

from __future__ import annotations

import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from workshop import Workshop

from deploytool.artifact import Artifact
from deploytool.backends import onnxruntime, ort_generate
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.bundle import selftest
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


class Said:
    """Session options that write down what is said to them."""

    def __init__(self) -> None:
        self.__dict__["said"] = {}

    def __setattr__(self, name: str, value: Any) -> None:
        self.said[name] = value

    def add_session_config_entry(self, name: str, value: str) -> None:
        self.said[name] = value


UNUSUAL = {"without": ["SkipLayerNormFusion"], "arena": False, "flush": True, "optimization": "extended", "threads": 3,
           "spinning": False, "fuse_qdq": False, "packing": False}  # fmt: skip


@pytest.mark.parametrize("changed", UNUSUAL)
def test_all_open_it_alike(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: str
) -> None:
    """deploytool, the generator and a bundle's self-test say the very same to the session; no setting is left out."""
    built = workshop.artifact("mlp", "ort")
    said: list[Any] = []

    def opened(path: str, options: Any = None, **named: Any) -> Any:
        said.append((options.said, named))
        return real(path, providers=["CPUExecutionProvider"])

    real = ort.InferenceSession
    monkeypatch.setattr(ort, "SessionOptions", Said)
    monkeypatch.setattr(ort, "InferenceSession", opened)
    usual = {**built.settings, "threads": 1}
    found = []
    for name, settings in (("usual", usual), ("unusual", {**usual, changed: UNUSUAL[changed]})):
        shutil.copytree(built.folder, tmp_path / name)
        artifact = replace(built, folder=tmp_path / name, settings=settings).save()
        said.clear()
        open_artifact(artifact).__exit__(None, None, None)
        ort_generate.open_model(artifact.folder)
        variant = artifact.to_json()
        selftest.open_onnx(str(artifact.main_file), [], settings["threads"], selftest.onnx_settings(variant))
        assert len(said) == 3 and said[0] == said[1] == said[2]
        found.append(said[0])
    assert found[0] != found[1]


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

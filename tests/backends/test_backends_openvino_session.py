"""How an OpenVINO model is compiled is said by its artifact, to all that open it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov

from deploytool.backends import openvino_generate
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.bundle import selftest


@pytest.mark.parametrize("hint", ["latency", "throughput"])
def test_all_compile_it_alike(workshop: Workshop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, hint: str) -> None:
    """deploytool, the generator and a bundle's self-test compile with the very same configuration, the hint too."""
    built = build_artifact(workshop.request("mlp", load_checked_target("openvino"), hint=hint), {})
    assert built.settings["hint"] == hint
    shutil.copytree(built.folder, tmp_path / "a")
    artifact = replace(built, folder=tmp_path / "a", settings={**built.settings, "threads": 1}).save()
    said: list[Any] = []
    real = ov.Core.compile_model
    monkeypatch.setattr(ov.Core, "compile_model", lambda *a: said.append(a[2:]) or real(*a))
    with open_artifact(artifact):
        pass
    monkeypatch.setattr(openvino_generate, "KeptCache", lambda *_: None)
    openvino_generate.open_decoder(artifact.folder, 8)
    names = list(artifact.signature.input_names), list(artifact.signature.output_names)
    variant = {**artifact.to_json(), "format": "openvino"}
    engine = selftest.open_engine(variant, str(artifact.main_file))
    assert names[0] and len(said) == 3 and said[0] == said[1] == said[2]
    assert said[0][1]["PERFORMANCE_HINT"] == hint.upper()
    feeds = workshop.feeds("mlp")[0]
    for name, array in workshop.reference("mlp", feeds).items():
        np.testing.assert_allclose(engine(feeds)[name], array, rtol=1e-4, atol=1e-5)


def test_nothing_compiled_is_shipped(workshop: Workshop) -> None:
    """A compiled model fits one CPU and one release: an artifact that was built and run holds the graph alone."""
    artifact = build_artifact(workshop.request("mlp", load_checked_target("openvino")), {})
    with open_artifact(artifact) as run:
        run.run(workshop.feeds("mlp")[0])
    assert {path.suffix for path in artifact.folder.rglob("*") if path.is_file()} <= {".xml", ".bin", ".json"}


def test_throughput_divides_the_threads(workshop: Workshop) -> None:
    """The engine itself must have taken the hint."""
    for hint in ("latency", "throughput"):
        artifact = build_artifact(workshop.request("mlp", load_checked_target("openvino"), hint=hint), {})
        with open_artifact(artifact) as run:
            compiled = run.request.get_compiled_model()  # type: ignore[attr-defined]
            assert str(compiled.get_property("PERFORMANCE_HINT")).upper().endswith(hint.upper())

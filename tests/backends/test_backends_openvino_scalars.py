"""What OpenVINO's CPU plugin makes of a quantized graph: it compiles, or the build says why not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import TINY, Workshop, cosine

pytest.importorskip("openvino")
pytest.importorskip("nncf")

import openvino as ov
from openvino import opset13 as op

from deploytool.backends import openvino_int8
from deploytool.backends.base import build_artifact, load_checked_target, open_artifact
from deploytool.backends.openvino import compile_ir
from deploytool.backends.openvino_scalars import move_scalars
from deploytool.errors import BackendFailed
from deploytool.source import ModelRef

FEED = np.random.default_rng(0).standard_normal((2, 5, 32)).astype(np.float32)


def number(value: float, *shape: int) -> ov.Node:
    return op.constant(np.full(shape, value, np.float32))


def rounded(x: Any, high: float) -> Any:
    return op.fake_quantize(x, number(-high), number(high), number(-high), number(high), 256)


def turned(x: Any) -> Any:
    """[n, length, 32] as heads: [n, 4, length, 8]."""
    heads = op.reshape(x, np.array([0, 0, 4, 8], np.int64), True)
    return op.transpose(heads, np.array([0, 2, 1, 3], np.int64))


def graph(build: Any) -> ov.Model:
    """A model of one input x [n, length, 32]; `build` makes its outputs, which are named y0, y1, ..."""
    x = op.parameter([-1, -1, 32], np.float32, "x")
    outputs = build(x)
    for index, node in enumerate(outputs):
        node.output(0).set_names({f"y{index}"})
    return ov.Model([op.result(node) for node in outputs], [x], "m")


def run(model: ov.Model) -> dict[str, np.ndarray]:
    compiled = compile_ir(model, 1)
    found = compiled({0: FEED})
    return {name: np.array(found[port]) for port in compiled.outputs for name in port.get_names()}


def order(model: ov.Model) -> list[str]:
    plain = ("Parameter", "Constant", "Result")
    return [one.get_type_name() for one in model.get_ordered_ops() if one.get_type_name() not in plain]


def test_scalars_come_first() -> None:
    """A factor and a rounding after a transpose must come before it and its reshape; names and values stay."""
    model = graph(lambda x: [rounded(op.multiply(turned(x), number(0.35, 1, 1, 1)), 0.8)])
    before = run(model)
    assert move_scalars(model) == 2
    assert order(model) == ["Multiply", "FakeQuantize", "Reshape", "Transpose"]
    after = run(model)
    assert after.keys() == before.keys() == {"y0"}
    np.testing.assert_allclose(after["y0"], before["y0"], atol=1e-6)


def test_what_others_read_stays() -> None:
    """A transpose with a second reader, a vector of factors, and a number of more axes than the tensor must stay."""
    def shared(x: Any) -> list[Any]:
        heads = turned(x)
        return [op.multiply(heads, number(2.0)), op.relu(heads)]

    for build in (shared, lambda x: [op.multiply(turned(x), number(2.0, 8))],
                  lambda x: [op.multiply(op.transpose(x, np.array([0, 2, 1])), number(2.0, 1, 1, 1, 1))]):  # fmt: skip
        model = graph(build)
        was = order(model)
        assert move_scalars(model) == 0
        assert order(model) == was


@pytest.mark.parametrize("max_drop", [None, 0.5])
def test_a_lookup_by_sizes_alone_builds(workshop: Workshop, tmp_path: Path, max_drop: float | None) -> None:
    """Attention over a table of one row must become int8, compile, and be near eager: the plugin alone gives up."""
    model, target = tmp_path / "segments.py", load_checked_target("openvino-int8")
    model.write_text((TINY / "segments.py").read_text() + "\n\ndef evaluate(predict):\n    return {'metric': 1.0}\n")
    request = workshop.request("segments", target, **({} if max_drop is None else {"max_drop": max_drop}))
    artifact = build_artifact(replace(request, ref=ModelRef("python", "segments", str(model))), {})
    assert artifact.settings["quantizers"] >= 4
    with open_artifact(artifact) as runner:
        for feeds in workshop.feeds("segments"):
            found, wanted = runner.run(feeds)["hidden"], workshop.reference("segments", feeds)["hidden"]
            assert cosine(found, wanted) >= target.parity.cosine_min


@pytest.mark.parametrize("wrong", ["shape", "input"])
def test_a_graph_that_the_engine_refuses_is_told(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    """What the engine cannot compile or run must end as a backend's failure with its reason and what to do."""
    def unfit(*arguments: Any) -> ov.Model:
        if wrong == "input":
            return graph(lambda x: [x])  # the feeds have no x
        tokens = op.parameter([-1, -1], np.int64, "tokens")
        tokens.output(0).set_names({"tokens"})
        return ov.Model([op.result(op.reshape(tokens, np.array([7, 13], np.int64), False))], [tokens], "m")

    monkeypatch.setattr(openvino_int8, "_quantize", unfit)
    with pytest.raises(BackendFailed, match=r"compile and run the quantized graph .got: (?!Exception from)") as caught:
        build_artifact(workshop.request("segments", load_checked_target("openvino-int8")), {})
    assert caught.value.code == "DT504"
    assert "build.exclude" in str(caught.value.fix)

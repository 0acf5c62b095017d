"""Nodes judged by themselves: a fault that the outputs hide must fail, and a right artifact must not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic

from deploytool.artifact import Artifact
from deploytool.backends.cut import Stored
from deploytool.backends.onnxruntime import open_session
from deploytool.cases import Case
from deploytool.difference import relative_error
from deploytool.signature import Signature, TensorSpec
from deploytool.verify.bisect import bisect_job, has_sharp_bounds
from deploytool.verify.nodes import judge_nodes, nodes_job, not_judged, unjudged, unjudged_said
from deploytool.verify.weights import STEPS_MAX, steps_off

WIDTH = 16
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 5, WIDTH)),),
                      (TensorSpec("y", "float32", ("batch", 5, WIDTH)),))  # fmt: skip


def graph() -> ModelProto:
    """Attention with a bias of the keys, which softmax cancels, and a norm, which cancels a shift of all its inputs."""
    rng = np.random.default_rng(0)
    weights = {n: rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) * 0.4 for n in ("wq", "wk", "wv", "wo")}
    weights |= {"bk": rng.standard_normal(WIDTH).astype(np.float32), "g": np.ones(WIDTH, np.float32)}
    steps = [("MatMul", ["x", "wq"], "q"), ("MatMul", ["x", "wk"], "kw"), ("Add", ["kw", "bk"], "k"),
             ("MatMul", ["x", "wv"], "v"), ("Transpose", ["k"], "kt"), ("MatMul", ["q", "kt"], "s"),
             ("Softmax", ["s"], "p"), ("MatMul", ["p", "v"], "m"), ("MatMul", ["m", "wo"], "o"),
             ("LayerNormalization", ["o", "g"], "y")]  # fmt: skip
    extra = {"kt": {"perm": [0, 2, 1]}}
    nodes = [helper.make_node(kind, inputs, [name], name=name, **extra.get(name, {})) for kind, inputs, name in steps]
    shape = ["batch", 5, WIDTH]
    made = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
                             [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
                             [numpy_helper.from_array(array, name) for name, array in weights.items()])  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared folder with two cases."""
    folder = tmp_path / "prepared"
    (folder / "onnx").mkdir(parents=True)
    onnx.save(graph(), folder / "onnx" / "model.onnx")
    session = open_session(folder / "onnx" / "model.onnx", 1)
    rng = np.random.default_rng(1)
    for index, batch in enumerate((2, 1)):
        inputs = {"x": rng.standard_normal((batch, 5, WIDTH)).astype(np.float32)}
        Case(inputs, reference={"y": np.asarray(session.run(None, inputs)[0])}).save(
            folder / "cases" / f"{index:03d}.npz"
        )
    return folder


def made(prepared: Path, change: Callable[[ModelProto], None], precision: str) -> tuple[Path, float]:
    """An artifact of the graph, int8 or not, changed; and how far its outputs then are from the unchanged one's."""
    folder = prepared.parent / "artifact"
    folder.mkdir()
    if precision == "int8":
        quantize_dynamic(prepared / "onnx" / "model.onnx", folder / "model.onnx", weight_type=QuantType.QInt8,
                         per_channel=True, reduce_range=True)  # fmt: skip
    else:
        onnx.save(graph(), folder / "model.onnx")
    inputs = Case.load(prepared / "cases" / "000.npz").inputs
    before = np.asarray(open_session(folder / "model.onnx", 1).run(None, inputs)[0])
    model = onnx.load(folder / "model.onnx")
    change(model)
    onnx.save(model, folder / "model.onnx")
    after = np.asarray(open_session(folder / "model.onnx", 1).run(None, inputs)[0])
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", precision, SIGNATURE, settings={"threads": 1}).save()
    return folder, relative_error(before, after)


def constant(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto], None]:
    def fault(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        old = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(old)).astype(old.dtype), name))

    return fault


def no_bias(model: ModelProto) -> None:
    """Leave the bias of the keys out."""
    model.graph.node.remove(next(node for node in model.graph.node if node.output[0] == "k"))
    next(node for node in model.graph.node if node.output[0] == "kt").input[0] = "kw"


def one_code(codes: np.ndarray) -> np.ndarray:
    """One code of all moved by four steps towards zero."""
    codes = codes.copy()
    codes.flat[7] -= np.sign(codes.flat[7]) * 4
    return codes


FAULTS = {
    "cancelled bias": (no_bias, "fp32", "k", "missing node", 1e-4),
    "cancelled shift": (constant("wo_quantized", lambda q: q), "int8", "", "", 0.0),
    "zero point": (constant("wo_zero_point", lambda z: z + 3), "int8", "o", "wrong zero point", 0.05),
    "scale": (constant("wq_scale", lambda s: s * np.float32(1.06)), "int8", "q", "wrong scale", 0.05),
    "one number": (constant("wk_quantized", one_code), "int8", "kw", "stale weight", 0.02),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_outputs_hide_is_seen(name: str, prepared: Path) -> None:
    """A fault that moves the outputs by less than their limit must fail by its node, and a right graph pass."""
    fault, precision, node, cause, moves = FAULTS[name]
    folder, moved = made(prepared, fault, precision)
    assert moved <= moves
    found = nodes_job(str(folder), str(prepared), {})
    json.dumps(found, allow_nan=False)
    assert found["cases"] == 2 and found["tensors"] == 10 - (fault is no_bias) and unjudged_said(found) == []
    sentences = judge_nodes(found)
    assert [wrong["node"] for wrong in found["wrong"]] == ([node] if node else [])
    assert [wrong["cause"] for wrong in found["wrong"]] == ([cause] if cause else [])
    assert all(f" {node} is wrong by itself: {cause}" in sentence for sentence in sentences)
    if node:
        assert bisect_job(str(folder), str(prepared), {})["node"] == node


def test_steps_are_the_stored_ones() -> None:
    """Rounding leaves at most half a step, any other code at least a half more; no step and no number are endless."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((32, 8))
    steps = np.abs(weight).max(axis=0) / 63
    codes = np.round(weight / steps)
    assert steps_off(weight, Stored(codes * steps, steps)) <= 0.5
    assert steps_off(weight, Stored((codes + 2) * steps, steps)) > STEPS_MAX
    assert steps_off(weight, Stored(codes * steps, steps * 0)) == float("inf")
    assert steps_off(weight, Stored(codes * np.nan, steps)) == float("inf")
    assert steps_off(weight, Stored(weight, steps * 0)) == 0


def of(backend: str, precision: str, **settings: Any) -> Artifact:
    return Artifact(Path("nowhere"), backend, "onnx", "m", precision, SIGNATURE, settings=settings)


def test_what_is_not_judged_is_said(prepared: Path) -> None:
    """An artifact without a graph to cut, or of 4 bits, must have its nodes reported as not judged, never as right."""
    assert unjudged(of("onnxruntime", "fp32")) is None
    own_format = Artifact(Path("nowhere"), "onnxruntime", "onnx", "model.ort", "fp32", SIGNATURE)
    whys = {"module itself": of("eager", "fp32"), "compiled library": of("inductor", "fp32"),
            "4-bit": of("onnxruntime", "int4"), "own format": own_format}  # fmt: skip
    for word, artifact in whys.items():
        why = unjudged(artifact)
        assert why and word in why
        assert unjudged_said(not_judged(why)) == [f"nodes were not judged by themselves: {why}"]
    folder, _ = made(prepared, lambda model: None, "fp32")
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", "int4", SIGNATURE).save()
    found = nodes_job(str(folder), str(prepared), {})
    assert found["tensors"] == 0 and "4-bit" in found["unjudged"]
    assert len(unjudged_said({"unjudged": None, "uncertain": 3, "refused": 2})) == 2


def test_bounds_are_sharp_where_ranges_follow_from_the_tensors() -> None:
    """Ranges that calibration fixed by cutting off make no verdict on a node of whole numbers."""
    assert has_sharp_bounds(of("onnxruntime", "int8")) and has_sharp_bounds(of("fbgemm", "int8", scheme="static"))
    assert has_sharp_bounds(of("openvino", "fp32"))
    assert not has_sharp_bounds(of("openvino", "int8")) and not has_sharp_bounds(of("onnxruntime", "int4"))
    assert not has_sharp_bounds(of("onnxruntime", "int8", scheme="static"))

"""Products of low-bit weights in the arithmetic that their profile says: a flipped level must fail, by its node."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.onnxruntime import open_session
from deploytool.backends.ort_weights import Plan, compress_weights
from deploytool.cases import Case
from deploytool.signature import Signature, TensorSpec
from deploytool.verify.bisect import bisect_job
from deploytool.verify.nodes import judge_nodes, nodes_job, promises_job
from deploytool.verify.parity import parity_job
from deploytool.verify.promise import broken_promises

WIDTH = 32
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", WIDTH)),), (TensorSpec("y", "float32", ("batch", WIDTH)),))


def graph() -> ModelProto:
    """Two products with an activation between them."""
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((WIDTH, WIDTH)).astype(np.float32) * 0.2, n)
               for n in ("up.weight", "down.weight")]  # fmt: skip
    steps = [("MatMul", ["x", "up.weight"], "h"), ("Tanh", ["h"], "t"), ("MatMul", ["t", "down.weight"], "y")]
    nodes = [helper.make_node(kind, inputs, [name], name=f"/{name}") for kind, inputs, name in steps]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy"]
    return helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], weights), ir_version=10,
                             opset_imports=[helper.make_opsetid("", 18)])  # fmt: skip


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared folder with a case."""
    folder = tmp_path / "prepared"
    (folder / "onnx").mkdir(parents=True)
    onnx.save(graph(), folder / "onnx" / "model.onnx")
    inputs = {"x": np.random.default_rng(1).standard_normal((4, WIDTH)).astype(np.float32)}
    outputs = open_session(folder / "onnx" / "model.onnx", 1).run(None, inputs)
    Case(inputs, reference={"y": np.asarray(outputs[0])}).save(folder / "cases" / "000.npz")
    return folder


def built(prepared: Path, precision: str, build: dict[str, Any], flipped: dict[str, int]) -> Path:
    """A weight-only artifact as the backend writes it, then the levels of some nodes changed."""
    model = ir.from_proto(graph())
    plan = Plan(4 if precision == "int4" else 8, WIDTH, build.get("activations", "int8"))
    compress_weights(model, {"up.weight": plan, "down.weight": plan})
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports["com.microsoft"] = 1
    proto = ir.to_proto(model)
    for node in proto.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and node.name in flipped:
                attribute.i = flipped[node.name]
    folder = prepared.parent / "artifact"
    folder.mkdir()
    onnx.save(proto, folder / "model.onnx")
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", precision, SIGNATURE, settings={"threads": 1},
             target={"build": build}).save()  # fmt: skip
    return folder


INT8 = {"scheme": "weights", "activations": "int8"}
FLIPS = [
    ("int4", {"activations": "int8"}, {"/h": 1}),
    ("int4", {}, {"/y": 0}),
    ("int4", {"activations": "fp32"}, {"/y": 4}),
    ("int8", INT8, {"/h": 1}),
    ("int8", {**INT8, "activations": "fp32"}, {"/h": 4, "/y": 4}),
]


@pytest.mark.parametrize(("precision", "build", "flipped"), FLIPS)
def test_a_flipped_level_fails_by_its_node(
    precision: str, build: dict[str, Any], flipped: dict[str, int], prepared: Path
) -> None:
    """A level that is not the profile's must fail and its node be named, by both, though the outputs are near."""
    folder = built(prepared, precision, build, flipped)
    near = parity_job(str(folder), str(prepared / "cases"))["outputs"]["y"]
    assert near["cosine"] > 0.98 and near["problems"] == []
    found = nodes_job(str(folder), str(prepared), {})
    sentences = judge_nodes(found)
    assert [wrong["node"] for wrong in found["wrong"]] == list(flipped) and promises_job(str(folder)) == found["wrong"]
    for name, sentence in zip(flipped, sentences, strict=True):
        assert sentence.startswith(f"MatMulNBits {name} is wrong by itself: accuracy level: accuracy_level must be ")
        assert f"(got {flipped[name]})" in sentence
    bisected = bisect_job(str(folder), str(prepared), {})
    assert (bisected["node"], bisected["cause"]) == (next(iter(flipped)), "accuracy level")


@pytest.mark.parametrize(("precision", "build"), list({str(flip[:2]): flip[:2] for flip in FLIPS}.values()))
def test_levels_of_the_profile_pass(precision: str, build: dict[str, Any], prepared: Path) -> None:
    """As the backend writes it no node breaks a promise."""
    folder = built(prepared, precision, build, {})
    assert judge_nodes(nodes_job(str(folder), str(prepared), {})) == []
    assert bisect_job(str(folder), str(prepared), {})["cause"] != "accuracy level"


def test_an_unknown_promise_is_broken(prepared: Path) -> None:
    """A manifest whose profile says what no level is must not pass for right."""
    folder = built(prepared, "int4", {}, {})
    opened = Artifact.load(folder)
    Artifact(**{**vars(opened), "target": {"build": {"activations": "int16"}}}).save()
    assert len(broken_promises(Artifact.load(folder))) == 2

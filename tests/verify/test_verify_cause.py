"""Likely causes that only numbers show: constants of one number, numbers too large or too small for the arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.onnx_fp16 import write_fp16
from deploytool.backends.onnx_half import to_half
from deploytool.backends.onnxruntime import open_session
from deploytool.cases import Case
from deploytool.signature import Signature, TensorSpec
from deploytool.verify.bisect import bisect_job
from deploytool.verify.nodes import judge_nodes, nodes_job

WIDTH = 16
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", WIDTH)),), (TensorSpec("y", "float32", ("batch", 3)),))
Change = Callable[[ModelProto], ModelProto | None]


def graph() -> ModelProto:
    """A product, its root mean square norm written out, a factor, and a head."""
    rng = np.random.default_rng(0)
    weights = {"lin.w": rng.standard_normal((WIDTH, WIDTH)), "head.w": rng.standard_normal((WIDTH, 3)),
               "norm.eps": np.array(1e-3), "scale": np.array([0.25])}  # fmt: skip
    tensors = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    tensors.append(numpy_helper.from_array(np.array([-1], np.int64), "axes"))
    steps = [("MatMul", ["x", "lin.w"], "h"), ("Mul", ["h", "h"], "square"), ("ReduceMean", ["square", "axes"], "mean"),
             ("Add", ["mean", "norm.eps"], "safe"), ("Sqrt", ["safe"], "root"), ("Div", ["h", "root"], "normed"),
             ("Mul", ["normed", "scale"], "scaled"), ("MatMul", ["scaled", "head.w"], "y")]  # fmt: skip
    nodes = [helper.make_node(kind, inputs, [name], name=name) for kind, inputs, name in steps]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", w]) for n, w in (("x", WIDTH), ("y", 3)))
    return helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], tensors), opset_imports=[helper.make_opsetid("", 18)], ir_version=10
    )


def prepared(folder: Path, size: float) -> Path:
    """A prepared folder with two cases whose inputs are about as large as `size`."""
    (folder / "onnx").mkdir(parents=True)
    onnx.save(graph(), folder / "onnx" / "model.onnx")
    session = open_session(folder / "onnx" / "model.onnx", 1)
    rng = np.random.default_rng(1)
    for index, batch in enumerate((2, 3)):
        inputs = {"x": (size * rng.standard_normal((batch, WIDTH))).astype(np.float32)}
        outputs = np.asarray(session.run(None, inputs)[0])
        Case(inputs, reference={"y": outputs}).save(folder / "cases" / f"{index:03d}.npz")
    return folder


def found(change: Change, tmp_path: Path, size: float, precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What bisection finds in the changed graph, and what the judgement of nodes does."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    model = graph()
    onnx.save(change(model) or model, folder / "model.onnx")
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", precision, SIGNATURE, settings={"threads": 1}).save()
    place = str(prepared(tmp_path / "prepared", size))
    return bisect_job(str(folder), place, {}), nodes_job(str(folder), place, {})


def constant(name: str, value: float) -> Change:
    def fault(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), value, np.float32), name))

    return fault


def through(tensor: str, *factors: float) -> Change:
    """Multiply a tensor by each factor in turn, then divide by each: nothing where numbers are large enough."""

    def fault(model: ModelProto) -> None:
        maker = next(node for node in model.graph.node if tensor in node.output)
        at = list(model.graph.node).index(maker) + 1
        maker.output[0] = last = f"{tensor}~"
        steps = [("Mul", factor) for factor in factors] + [("Div", factor) for factor in factors]
        for index, (kind, factor) in enumerate(steps):
            model.graph.initializer.append(numpy_helper.from_array(np.float32(factor), f"{tensor}~f{index}"))
            result = tensor if index == len(steps) - 1 else f"{tensor}~{index}"
            model.graph.node.insert(at + index, helper.make_node(kind, [last, f"{tensor}~f{index}"], [result],
                                                                 name=f"~{kind}{index}"))  # fmt: skip
            last = result

    return fault


def halved(*kept: str) -> Change:
    """Half precision but for these nodes, whatever overflows."""
    return lambda model: to_half(model, kept)


FAULTS = {
    "epsilon": (constant("norm.eps", 0.5), 1.0, "fp32", "safe", "wrong constant"),
    "epsilon a little": (constant("norm.eps", 1.9e-3), 0.01, "fp32", "safe", "wrong constant"),
    "factor": (constant("scale", 0.26), 1.0, "fp32", "scaled", "wrong constant"),
    "denormals": (through("normed", 1e-38, 1e-5), 1.0, "fp32", "normed", "denormals"),
    "denormals of two steps": (through("h", 1e-25, 1e-18), 1.0, "fp32", "h", "denormals"),
    "denormals beside a like node": (through("scaled", 1e-38, 1e-5), 1.0, "fp32", "scaled", "denormals"),
    "overflow of a square": (halved(), 300.0, "fp16", "square", "fp16 overflow"),
    "overflow of a sum": (halved("square"), 150.0, "fp16", "mean", "fp16 overflow"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_causes_are_named(name: str, tmp_path: Path) -> None:
    """Each fault must be found at its node with its cause, by bisection and by the judgement of nodes."""
    change, size, precision, node, cause = FAULTS[name]
    bisected, nodes = found(change, tmp_path, size, precision)
    assert (bisected["found"], bisected["node"], bisected["cause"]) == ("node", node, cause), bisected["sentence"]
    assert (nodes["wrong"][0]["node"], nodes["wrong"][0]["cause"]) == (node, cause)
    assert judge_nodes(nodes)[0].endswith(bisected["sentence"])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_same_sizes_without_a_fault_pass(precision: str, tmp_path: Path) -> None:
    """Large numbers and small constants are no fault where the build kept what half precision cannot hold."""

    def right(model: ModelProto) -> ModelProto | None:
        if precision == "fp32":
            return None
        onnx.save(model, tmp_path / "plain.onnx")
        feeds = [{"x": np.full((1, WIDTH), 300, np.float32)}]
        write_fp16(tmp_path / "plain.onnx", feeds, (), tmp_path / "half.onnx")
        return onnx.load(tmp_path / "half.onnx")

    bisected, nodes = found(right, tmp_path, 300.0, precision)
    assert bisected["found"] == "accumulated" and nodes["wrong"] == [] and nodes["tensors"] == 8

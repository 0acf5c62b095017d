"""The rewrite of a graph to half precision, and what it must leave in float."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from deploytool.backends.onnx_fp16 import rounding_session, write_fp16  # noqa: E402
from deploytool.backends.onnx_half import to_half  # noqa: E402
from deploytool.errors import InputRefused  # noqa: E402

FLOAT = TensorProto.FLOAT


def graph(nodes: list[Any], constants: dict[str, Any], outputs: tuple[str, ...] = ("y",)) -> Any:
    """A model of one float input x [batch, 4] and float outputs."""
    return helper.make_model(
        helper.make_graph(
            nodes, "g", [helper.make_tensor_value_info("x", FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)], ir_version=9,
    )  # fmt: skip


def run(model: Any, x: np.ndarray) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, Path(folder) / "model.onnx")
        result: list[np.ndarray] = rounding_session(Path(folder) / "model.onnx").run(None, {"x": x})
    return result


def fp16(model: Any, tmp_path: Path, x: np.ndarray, ops: tuple[str, ...] = ()) -> tuple[Any, dict[str, Any]]:
    onnx.save(model, tmp_path / "full.onnx")
    done = write_fp16(tmp_path / "full.onnx", [{"x": x}], ops, tmp_path / "half.onnx")
    return onnx.load(tmp_path / "half.onnx"), dict(done)


def kinds(model: Any) -> dict[str, int]:
    """Type of every node's first output, by node name."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.output)}
    return {node.name: types[node.output[0]] for node in inferred.node}


W = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)


def test_one_tensor_may_feed_several_float_nodes(tmp_path: Path) -> None:
    """A tensor read by two fp32 nodes and a half one must be cast once, and the graph must load and agree."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Pow", ["h", "two"], ["a"], name="square"),
        helper.make_node("ReduceSum", ["h"], ["b"], name="sum", keepdims=1),
        helper.make_node("Add", ["a", "h"], ["c"], name="add"),
        helper.make_node("Mul", ["c", "b"], ["y"], name="mul"),
    ]
    model = graph(nodes, {"w": W, "two": np.float32(2)})
    half, done = fp16(model, tmp_path, X)
    types = kinds(half)
    assert (types["product"], types["add"]) == (TensorProto.FLOAT16, TensorProto.FLOAT16)
    assert (types["square"], types["sum"]) == (FLOAT, FLOAT)
    assert sum(node.op_type == "Cast" and node.input[0] == "h" for node in half.graph.node) == 1
    assert done["fp32_nodes"]["by_kind"] == 2
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], rtol=0.02, atol=0.02)
    assert run(half, X)[0].dtype == np.float32


def test_values_beyond_half_precision_stay_float(tmp_path: Path) -> None:
    """A node whose values pass 65,504 on real inputs must compute in float; converted anyway it gives infinity."""
    nodes = [
        helper.make_node("Mul", ["x", "big"], ["h"], name="up"),
        helper.make_node("Mul", ["h", "small"], ["y"], name="down"),
    ]
    model = graph(nodes, {"big": np.full(4, 3e5, np.float32), "small": np.full(4, 1e-3, np.float32)})
    half, done = fp16(model, tmp_path, X)
    assert done["fp32_nodes"]["out_of_range"] == ["up", "down"]
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], rtol=1e-2)
    assert not np.isfinite(run(to_half(model, ()), X)[0]).all()


def test_epsilons_stay_float(tmp_path: Path) -> None:
    """A constant that half precision rounds to zero must keep its node in float, so that nothing divides by zero."""
    nodes = [
        helper.make_node("Sub", ["x", "x"], ["zero"], name="zero"),
        helper.make_node("Add", ["zero", "epsilon"], ["e"], name="guard"),
        helper.make_node("Div", ["e", "epsilon"], ["y"], name="div"),
    ]
    model = graph(nodes, {"epsilon": np.float32(1e-12)})
    half, done = fp16(model, tmp_path, X)
    assert done["fp32_nodes"]["small_constants"] == 2
    np.testing.assert_allclose(run(half, X)[0], 1.0)
    assert np.isnan(run(to_half(model, ()), X)[0]).all()


def test_mask_constants_are_clipped(tmp_path: Path) -> None:
    """The -3.4e38 of an attention mask must become a large finite number whose softmax is still 0."""
    lowest = np.array([0, 0, 0, np.finfo(np.float32).min], np.float32)
    nodes = [
        helper.make_node("Add", ["x", "mask"], ["s"], name="add"),
        helper.make_node("Softmax", ["s"], ["y"], name="softmax"),
    ]
    model = graph(nodes, {"mask": lowest})
    half, _ = fp16(model, tmp_path, X)
    assert kinds(half)["add"] == TensorProto.FLOAT16
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], atol=2e-3)
    assert (run(half, X)[0][:, 3] == 0).all()


def test_new_infinities_are_refused(tmp_path: Path) -> None:
    """Where fp16 gives NaN or infinity and fp32 does not, the build must stop, and `fp32_ops` must cure it."""
    nodes = [
        helper.make_node("Mul", ["x", "tiny"], ["t"], name="down"),
        helper.make_node("Reciprocal", ["t"], ["r"], name="reciprocal"),
        helper.make_node("Mul", ["r", "tiny"], ["y"], name="back"),
    ]
    model = graph(nodes, {"tiny": np.full(4, 1e-9, np.float32)})
    with pytest.raises(InputRefused) as caught:
        fp16(model, tmp_path, X)
    assert caught.value.code == "DT310"
    assert "'y'" in str(caught.value)
    half, _ = fp16(model, tmp_path, X, ops=("Mul", "Reciprocal"))
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], rtol=1e-3)


def test_bodies_compute_in_float(tmp_path: Path) -> None:
    """A branch of an If must read the float form of what it captures from around it."""
    branch = [
        helper.make_graph([helper.make_node(op, ["h", "h"], [f"{op}:r"])], op, [],
                          [helper.make_tensor_value_info(f"{op}:r", FLOAT, None)])
        for op in ("Add", "Mul")
    ]  # fmt: skip
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("If", ["yes"], ["i"], name="if", then_branch=branch[0], else_branch=branch[1]),
        helper.make_node("MatMul", ["i", "w"], ["y"], name="after"),
    ]
    model = graph(nodes, {"w": W, "yes": np.array(True)})
    half, _ = fp16(model, tmp_path, X)
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], rtol=0.02, atol=0.02)


def test_constants_and_casts_follow(tmp_path: Path) -> None:
    """Constant, Cast to float and ConstantOfShape must give half precision where their readers do."""
    nodes = [
        helper.make_node("Constant", [], ["two"], name="two", value_float=2.0),
        helper.make_node("Constant", [], ["shape"], name="shape", value_ints=[4]),
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"], name="zeros"),
        helper.make_node("Cast", ["flags"], ["f"], name="cast", to=FLOAT),
        helper.make_node("Mul", ["x", "two"], ["a"], name="a"),
        helper.make_node("Add", ["a", "zeros"], ["b"], name="b"),
        helper.make_node("Add", ["b", "f"], ["y"], name="c"),
    ]
    model = graph(nodes, {"flags": np.array([0, 1, 0, 1], np.int64)})
    half, _ = fp16(model, tmp_path, X)
    types = kinds(half)
    assert {types[name] for name in ("two", "zeros", "cast", "a", "b", "c")} == {TensorProto.FLOAT16}
    np.testing.assert_allclose(run(half, X)[0], run(model, X)[0], atol=5e-3)


def test_every_half_value_is_rounded(tmp_path: Path) -> None:
    """Running an fp16 graph must round between operators, as a GPU does: 1 + 1e-4 - 1 is 0 in half precision."""
    nodes = [
        helper.make_node("Add", ["ones", "small"], ["a"], name="add"),
        helper.make_node("Sub", ["a", "ones"], ["b"], name="sub"),
        helper.make_node("Add", ["x", "b"], ["y"], name="give"),
    ]
    model = to_half(graph(nodes, {"ones": np.ones(4, np.float32), "small": np.full(4, 1e-4, np.float32)}), ())
    zeros = np.zeros((3, 4), np.float32)
    np.testing.assert_array_equal(run(model, zeros)[0], zeros)

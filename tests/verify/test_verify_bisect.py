"""The first wrong node: planted faults must be named, with their module and their cause; clean graphs blame nobody."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnxruntime")
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.cut import CutNode
from deploytool.backends.onnxruntime import open_session
from deploytool.cases import Case
from deploytool.errors import InputRefused
from deploytool.signature import Signature, TensorSpec
from deploytool.storage import write_json
from deploytool.verify.bisect import Search, bisect_job
from deploytool.verify.rounding import allowed, distance
from deploytool.verify.told import described

WIDTH, ROWS = 16, 40
SIGNATURE = Signature(
    (TensorSpec("ids", "int64", ("batch", "length")), TensorSpec("mask", "float32", ("batch", 1, "length"))),
    (TensorSpec("logits", "float32", ("batch", "length", 5)),),
)


def _node(kind: str, inputs: list[str], path: str, **attributes: Any) -> NodeProto:
    return helper.make_node(kind, inputs, [path.rpartition("/")[2]], name=f"/module/module/{path}", **attributes)


def graph() -> ModelProto:
    """A block of attention with its mask, a norm, a difference and a head; scopes named as the exporter names them."""
    rng = np.random.default_rng(0)
    shapes = {"embed": (ROWS, WIDTH), "q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH),
              "head": (WIDTH, 5), "norm": (WIDTH,)}  # fmt: skip
    weights = {f"{n}.weight": rng.standard_normal(s).astype(np.float32) * 0.4 for n, s in shapes.items()}
    weights["norm.bias"] = rng.standard_normal(WIDTH).astype(np.float32)
    shape = np.array([0, -1, WIDTH], np.int64)
    nodes = [
        _node("Gather", ["embed.weight", "ids"], "embed/x"),
        _node("MatMul", ["x", "q.weight"], "q/queries"),
        _node("MatMul", ["x", "k.weight"], "k/keys"),
        _node("MatMul", ["x", "v.weight"], "v/values"),
        _node("Transpose", ["keys"], "turned", perm=[0, 2, 1]),
        _node("MatMul", ["queries", "turned"], "scores"),
        _node("Add", ["scores", "mask"], "masked"),
        _node("Softmax", ["masked"], "shares", axis=-1),
        _node("MatMul", ["shares", "values"], "mixed"),
        _node("Reshape", ["mixed", "shape"], "shaped"),
        _node("Sub", ["x", "shaped"], "rest"),
        _node("LayerNormalization", ["rest", "norm.weight", "norm.bias"], "norm/normed", axis=-1, epsilon=1e-5),
        _node("MatMul", ["normed", "head.weight"], "head/logits"),
    ]
    values = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", "length"]),
              helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", 1, "length"])]  # fmt: skip
    tensors = [numpy_helper.from_array(array, name) for name, array in (*weights.items(), ("shape", shape))]
    made = helper.make_graph(nodes, "g", values, [helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)],
                             tensors)  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A prepared folder: the graph, and cases of three sizes with padding."""
    folder = tmp_path / "prepared"
    (folder / "onnx").mkdir(parents=True)
    onnx.save(graph(), folder / "onnx" / "model.onnx")
    session = open_session(folder / "onnx" / "model.onnx", 1)
    rng = np.random.default_rng(1)
    for index, (batch, length) in enumerate(((1, 6), (2, 4), (3, 5))):
        mask = np.zeros((batch, 1, length), np.float32)
        mask[-1, :, length // 2 :] = -3e38
        inputs = {"ids": rng.integers(0, ROWS, (batch, length)), "mask": mask}
        inputs["ids"][-1, 0] = ROWS - 1
        outputs = session.run(None, inputs)
        Case(inputs, reference={"logits": np.asarray(outputs[0])}).save(folder / "cases" / f"{index:03d}.npz")
    return folder


def bisected(change: Callable[[ModelProto], None], prepared: Path) -> dict[str, Any]:
    """What is found in an artifact whose graph was changed."""
    folder = prepared.parent / "artifact"
    folder.mkdir()
    model = graph()
    change(model)
    onnx.save(model, folder / "model.onnx")
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", "fp32", SIGNATURE, settings={"threads": 1}).save()
    found = bisect_job(str(folder), str(prepared), {})
    json.dumps(found, allow_nan=False)
    return found


def _find(model: ModelProto, output: str) -> NodeProto:
    return next(node for node in model.graph.node if output in node.output)


def _weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[ModelProto], None]:
    def fault(model: ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name == name)
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), name))

    return fault


def _one_stale(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[3, 3] += 1
    return array


def _no_mask(model: ModelProto) -> None:
    model.graph.node.remove(_find(model, "masked"))
    _find(model, "shares").input[0] = "scores"


def _swapped(output: str) -> Callable[[ModelProto], None]:
    def fault(model: ModelProto) -> None:
        node = _find(model, output)
        node.input[0], node.input[1] = node.input[1], node.input[0]

    return fault


def _axis(model: ModelProto) -> None:
    _find(model, "shares").attribute[0].i = 1


def _cut_off(model: ModelProto) -> None:
    at = list(model.graph.node).index(_find(model, "values")) + 1
    _find(model, "values").output[0] = "values~"
    model.graph.initializer.extend(numpy_helper.from_array(np.float32(v), n) for v, n in ((-0.3, "lo"), (0.3, "hi")))
    model.graph.node.insert(at, helper.make_node("Clip", ["values~", "lo", "hi"], ["values"]))


def _batch(model: ModelProto) -> None:
    _weight("shape", lambda shape: np.array([1, -1, WIDTH]))(model)


def _nan(model: ModelProto) -> None:
    """The root of the first id's distance to 39, minus 1: NaN where a sample starts with 39."""
    at = list(model.graph.node).index(_find(model, "normed")) + 1
    _find(model, "normed").output[0] = "normed~"
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(ROWS - 1.5), "limit"))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), "last"))
    steps = [("Cast", ["ids"], "f"), ("Sub", ["limit", "f"], "d"), ("Sqrt", ["d"], "r"), ("Mul", ["r", "zero"], "z"),
             ("Unsqueeze", ["z", "last"], "u"), ("Add", ["normed~", "u"], "normed")]  # fmt: skip
    for index, (kind, inputs, output) in enumerate(steps):
        extra = {"to": TensorProto.FLOAT} if kind == "Cast" else {}
        model.graph.node.insert(at + index, helper.make_node(kind, inputs, [output], **extra))


FAULTS = {
    "transposed": (_weight("k.weight", np.transpose), "k/keys", "k", "transposed weight"),
    "stale": (_weight("v.weight", _one_stale), "v/values", "v", "stale weight"),
    "scaled": (_weight("head.weight", lambda w: w * np.float32(1.5)), "head/logits", "head", "wrong scale"),
    "shifted": (_weight("q.weight", lambda w: w + np.float32(0.2)), "q/queries", "q", "wrong zero point"),
    "narrow": (_weight("q.weight", lambda w: w.clip(-0.5, 0.5)), "q/queries", "q", "range too narrow"),
    "mask": (_no_mask, "masked", "", "missing node"),
    "swapped": (_swapped("rest"), "rest", "", "swapped inputs"),
    "axis": (_axis, "shares", "", "wrong axis"),
    "saturated": (_cut_off, "v/values", "v", "saturation"),
    "batch": (_batch, "shaped", "", "baked-in shape"),
    "vocabulary": (_weight("embed.weight", lambda w: w[: ROWS - 1]), "embed/x", "embed", "truncated table"),
    "nan": (_nan, "norm/normed", "norm", "not a number"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_named(name: str, prepared: Path) -> None:
    """Each fault must be found at its node, with the source module and the right cause, and told in words."""
    fault, node, module, cause = FAULTS[name]
    found = bisected(fault, prepared)
    assert (found["found"], found["node"], found["module"]) == ("node", f"/module/module/{node}", module)
    assert found["cause"] == cause
    assert found["error_before"] is not None and found["error_before"] < 1e-5
    assert found["error_after"] is None or found["error_after"] > 1e-4
    lines = described(found)
    assert node in lines[0] and cause in lines[2]


def test_a_clean_graph_blames_no_node(prepared: Path) -> None:
    """Where nothing is wrong no node may be named as wrong."""
    found = bisected(lambda model: None, prepared)
    assert found["found"] == "accumulated" and found["output_error"] < 1e-5
    assert found["sound"] == "13 of 13 tensors are right by themselves"


def test_the_first_of_two_faults_is_named(prepared: Path) -> None:
    """Of two wrong nodes the earlier one must be named, and the other told."""

    def both(model: ModelProto) -> None:
        _weight("k.weight", np.transpose)(model)
        _weight("head.weight", np.negative)(model)

    found = bisected(both, prepared)
    assert found["node"].endswith("k/keys") and [o["node"] for o in found["others"]] == ["/module/module/head/logits"]


def test_a_small_fault_before_large_ones_is_named(prepared: Path) -> None:
    """An early node that is a little wrong must be named before later ones that are so by thousands of times more."""

    def many(model: ModelProto) -> None:
        _weight("q.weight", lambda w: w * np.float32(1.0005))(model)
        _weight("v.weight", np.negative)(model)
        _weight("head.weight", lambda w: w * np.float32(100))(model)

    found = bisected(many, prepared)
    assert found["node"].endswith("q/queries") and len(found["others"]) == 2
    assert found["own_error"] / found["allowed"] < 0.2 * found["others"][1]["own_error"] / found["others"][1]["allowed"]


def test_other_cases_are_looked_at(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is right on the case that was chosen must be found on another where it is wrong."""
    path = prepared / "cases" / "000.npz"
    case = Case.load(path)
    Case({**case.inputs, "ids": np.zeros_like(case.inputs["ids"])}, case.reference).save(path)
    monkeypatch.setattr("deploytool.verify.bisect.worst_case", lambda artifact, cases: (path, 0.5))
    monkeypatch.setattr("deploytool.verify.bisect.few_cases", lambda folder: [folder / "cases" / "001.npz"])

    def last_row(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array[-1] += 1
        return array

    found = bisected(_weight("embed.weight", last_row), prepared)
    assert (found["found"], found["case"], found["cause"]) == ("node", 1, "stale weight")
    assert found["node"] == "/module/module/embed/x"


def test_an_artifact_without_a_graph_is_refused(prepared: Path) -> None:
    """The eager module cannot be cut: that must be said, not crash."""
    folder = prepared.parent / "eager"
    folder.mkdir()
    write_json(folder / "source.json", {})
    Artifact(folder, "eager", "source", "source.json", "fp32", SIGNATURE).save()
    with pytest.raises(InputRefused, match="only an artifact with a graph"):
        bisect_job(str(folder), str(prepared), {})


class Scripted:
    """A graph whose nodes are right alone and wrong together, as after a wrong fusion."""

    def __init__(self, graph: Any) -> None:
        self.nodes, self.outputs, self._run = graph.nodes, graph.outputs, graph.run
        self.constant, self.stored = graph.constant, graph.stored

    def run(self, wanted: Any, given: Any) -> dict[str, np.ndarray]:
        found = self._run(wanted, given)
        if "shares" in wanted or "shares" in given:
            return dict(found)
        return {name: array if name in ("x", "queries", "keys", "scores", "masked") else array + 1
                for name, array in found.items()}  # fmt: skip


def test_a_wrong_fusion_is_told_apart(prepared: Path) -> None:
    """Nodes that are right one by one, and wrong when the engine runs them together, must be found as a fusion."""
    from deploytool.backends.onnx_cut import portable_graph

    whole = portable_graph(prepared)
    case = Case.load(prepared / "cases" / "001.npz")
    found = Search(whole, Scripted(whole), case.inputs, "fp32").find()
    assert found["found"] == "fusion" and found["error_before"] < 1e-6 and found["error_after"] > 0.1


def test_masks_are_compared_by_sign() -> None:
    """Numbers that stand for minus infinity equal any that do; a mask that is gone is no small error."""
    a = np.array([0.5, -3e38, 1.0], np.float32)
    assert distance(a, np.array([0.5, -65504.0, 1.0], np.float16)) == 0
    assert distance(a, np.array([0.5, 0.1, 1.0], np.float32)) == float("inf")


def test_what_int8_may_cost_is_no_excuse_for_fp32() -> None:
    """Quantized operators, and biases corrected for them, may cost 8-bit steps where int8 is promised, only there."""
    rng = np.random.default_rng(0)
    values = {"x": rng.standard_normal((4, 64)), "w": rng.standard_normal((64, 8)), "b": rng.standard_normal(8)}
    product = CutNode("p", "MatMul", {0: "x"}, ("y",), {1: "w"})
    addition = CutNode("a", "Add", {0: "y"}, ("z",), {1: "b"})
    integer = CutNode("i", "MatMulInteger", {0: "x"}, ("y",), {1: "w"})
    result = values["x"] @ values["w"]
    for region, there in (((product,), (integer,)), ((addition,), (addition,))):
        promised, excused = (allowed(region, there, values.get, result, p)[0] for p in ("fp32", "int8"))
        assert promised < 1e-3 < 5e-3 < excused < 0.2

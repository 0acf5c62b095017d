"""What TensorRT is given in every precision, and what stands in for it where there is no GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import Workshop, cosine

pytest.importorskip("tensorrt_rtx")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends.base import build_artifact, load_checked_target, nvidia_driver, open_artifact  # noqa: E402
from deploytool.backends.onnx_gptq import gptq  # noqa: E402
from deploytool.backends.onnx_opset import raise_opset  # noqa: E402
from deploytool.backends.onnx_rounded import HALVES, in_floats  # noqa: E402
from deploytool.backends.onnx_schemes import Fp8, Int4, block_scale  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.errors import InputRefused  # noqa: E402

pytestmark = pytest.mark.skipif(nvidia_driver(), reason="with a GPU the engine itself is the entry")
FLOORS = {"fp32": 0.99999, "fp16": 0.9999, "bf16": 0.999, "int8": 0.99, "fp8": 0.99, "int4": 0.98}
MATCHED = [("fp32", ""), ("fp16", ""), ("bf16", ""), ("int8", "fp32"), ("int8", "fp16"), ("fp8", "fp16"),
           ("fp8", "bf16"), ("int4", "fp32"), ("int4", "fp16")]  # fmt: skip
TYPES = {"bf16": TensorProto.BFLOAT16, "fp16": TensorProto.FLOAT16, "int8": TensorProto.INT8,
         "fp8": TensorProto.FLOAT8E4M3FN, "int4": TensorProto.INT4}  # fmt: skip


def built(workshop: Workshop, name: str, precision: str, **build: Any) -> Artifact:
    target = load_checked_target("trt")
    limits = target.parity.model_copy(update={"cosine_min": 0.98})
    device = target.device.model_copy(update={"compute_capabilities": ("SM89",)})
    update = {"precision": precision, "parity": limits, "device": device}
    return build_artifact(workshop.request(name, target.model_copy(update=update), **build), {})


@pytest.mark.parametrize(
    ("name", "precision", "rest"),
    [(name, *pair) for name in ("attention", "conv") for pair in MATCHED if (name, pair[0]) != ("conv", "int4")],
)
def test_every_precision_is_near_eager(workshop: Workshop, name: str, precision: str, rest: str) -> None:
    """The graph must hold the precision's type, build to an engine, keep its cosine, and say what it computes in."""
    artifact = built(workshop, name, precision, **({"rest": rest} if rest else {}))
    given = onnx.load(artifact.folder / "model.onnx")
    stored = {t.data_type for t in given.graph.initializer}
    assert {TYPES[kind] for kind in (precision, rest) if kind in TYPES} <= stored
    assert (artifact.folder / "model.engine").stat().st_size > 10_000
    with Asked(artifact) as asked:
        for feeds in workshop.feeds(name):
            outputs = asked.run(feeds)
            for key, exact in workshop.reference(name, feeds).items():
                assert min(map(cosine, exact, outputs[key])) >= FLOORS[precision]
        shares = (asked.ran(workshop.feeds(name)[0]) or {})["compute_by_precision"]
    assert shares["int4 weights" if precision == "int4" else precision] > 0.3, shares
    assert set(shares) <= {precision, rest or precision, "fp32", "int4 weights"}


def test_int4_without_matrices_is_refused(workshop: Workshop) -> None:
    """Weights in int4 are those of matrix products: a model without any must be refused."""
    with pytest.raises(InputRefused, match="must hold MatMul with constant weights"):
        built(workshop, "conv", "int4", rest="fp16")


@pytest.mark.parametrize(("precision", "rest"), [("bf16", ""), ("int8", "bf16"), ("fp8", "fp16")])
def test_a_stand_in_is_said_and_reads_the_same_weights(workshop: Workshop, precision: str, rest: str) -> None:
    """Where CPUs lack the products, the artifact must open and name another graph, which stores no weights again."""
    artifact = built(workshop, "mlp", precision, **({"rest": rest} if rest else {}))
    assert artifact.entry == "parity.onnx" == artifact.settings["parity_graph"]
    assert f"every tensor that it holds in {rest or precision} is rounded" in artifact.settings["parity_run"]
    for name in ("model.onnx", "parity.onnx"):
        files = {entry.value for t in onnx.load(artifact.folder / name, load_external_data=False).graph.initializer
                 for entry in t.external_data if entry.key == "location"}  # fmt: skip
        assert files == {"model.onnx.data"}
    assert "--onnx=model.onnx" in artifact.settings["rebuild"]


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["attention", "conv"])
def test_the_stand_in_rounds_every_tensor_of_the_given_graph(workshop: Workshop, name: str, kind: str) -> None:
    """Each 16-bit tensor of the graph must be, in its stand-in, the rounding of what its node gives."""
    artifact = built(workshop, name, kind)
    given = onnx.load(artifact.folder / "model.onnx")
    standing = in_floats(given)
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(given).graph.value_info}
    halves = [o for n in given.graph.node for o in n.output if types.get(o) in HALVES]
    exact = {o for n in standing.graph.node for o in n.output if o.endswith(":exact")}
    assert len(halves) > 4 and {f"{h}:exact" for h in halves} >= exact
    by_name = {n.name: n for n in standing.graph.node}
    assert [(n.name, n.op_type) for n in given.graph.node] == [
        (n.name, n.op_type) for n in standing.graph.node if not n.name.endswith(":rounding")]  # fmt: skip
    assert all(list(by_name[n.name].input) == list(n.input) for n in given.graph.node)
    asked = [*halves, *sorted(exact)]
    there = {v.name for v in standing.graph.output}
    standing.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in asked if n not in there)
    session = ort.InferenceSession(standing.SerializeToString(), providers=["CPUExecutionProvider"])
    values = dict(zip(asked, session.run(asked, dict(workshop.feeds(name)[0])), strict=True))
    dtype = helper.tensor_dtype_to_np_dtype(TYPES[kind])
    moved = 0
    for half in halves:
        before = values.get(f"{half}:exact", values[half])
        with np.errstate(over="ignore"):
            assert np.array_equal(values[half], before.astype(dtype).astype(np.float32)), half
        moved += int(np.sum(before != values[half]))
    assert moved > 100  # a stand-in without the roundings would be seen


def test_a_graph_whose_products_lie_is_seen(workshop: Workshop) -> None:
    """A wrong weight in the file that both graphs read must show in what the artifact gives."""
    artifact = built(workshop, "mlp", "bf16")
    feeds = workshop.feeds("mlp")[0]
    exact = workshop.reference("mlp", feeds)["output"]
    data = artifact.folder / "model.onnx.data"
    data.write_bytes(bytes(len(data.read_bytes())))
    with open_artifact(artifact) as runner:
        assert cosine(exact, runner.run(feeds)["output"]) < 0.9


def test_a_relu_before_fp8_is_not_lost(workshop: Workshop) -> None:
    """ONNX Runtime drops a Relu before a fp8 rounding unless it is told not to: the artifact must tell it."""
    artifact = built(workshop, "conv", "fp8", rest="fp32", keep_fp32=0)
    feeds = workshop.feeds("conv")[0]
    exact = next(iter(workshop.reference("conv", feeds).values()))
    with open_artifact(artifact) as runner:
        assert cosine(exact, next(iter(runner.run(feeds).values()))) > 0.99
    with open_artifact(replace(artifact, settings={**artifact.settings, "without": []})) as runner:
        assert cosine(exact, next(iter(runner.run(feeds).values()))) < 0.99


def test_fp8_codes_are_the_nearest() -> None:
    """Weights and activations must go to the nearest number of e4m3, the largest to its end, by channel or tensor."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 8)).astype(np.float32)
    codes, scale = Fp8().codes(weight, 1)
    grid = np.unique(np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32))
    grid = grid[np.isfinite(grid)]
    assert grid.max() == 448 == np.abs(codes.astype(np.float32)).max()
    nearest = np.abs((weight / scale)[..., None] - grid).min(-1)
    assert np.allclose(np.abs(weight / scale - codes.astype(np.float32)), nearest)
    rounded = Fp8().rounded(np.array([-9.0, 0.5, 2.0], np.float32), -1.0, 2.0)
    assert rounded[2] == 2.0 == -rounded[0] and abs(rounded[1] - 0.5) < 0.02


def test_gptq_makes_good_what_rounding_lost() -> None:
    """On inputs that go together GPTQ must lose less than rounding to the nearest, with codes of four bits."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((500, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((500, 64))).astype(
        "f4"
    )
    weight = rng.standard_normal((64, 24)).astype(np.float32)
    scheme = Int4(grams={"node": x.T @ x / 500}, group=32)
    codes, scale = scheme.codes(weight, 1, node="node")
    assert scale.shape == (2, 24) and np.abs(codes.astype(int)).max() <= 7
    by_gptq = codes.astype(np.float32) * np.repeat(scale, 32, axis=0)
    plain, ends = gptq(weight, np.eye(64, dtype=np.float32), 32, block_scale, 7)
    by_rounding = plain * np.repeat(ends, 32, axis=0)
    assert np.linalg.norm(x @ (by_gptq - weight)) < 0.5 * np.linalg.norm(x @ (by_rounding - weight))


@pytest.mark.parametrize(("inputs", "group", "block"), [(384, 128, 128), (96, 64, 32), (10, 64, 10), (16, 16, 16)])
def test_blocks_divide_the_inputs(inputs: int, group: int, block: int) -> None:
    """A block must be the largest that is wanted and divides the inputs; all of them where none does."""
    assert Int4(group=group).block(inputs) == block


def test_scales_are_what_their_type_holds() -> None:
    """Codes must be found with the scale that is stored: rounding it afterwards would stretch every weight."""
    weight = np.linspace(-1, 1, 30).reshape(10, 3).astype(np.float32)
    scheme = Fp8(scales=TensorProto.BFLOAT16)
    _, scale = scheme.codes(weight, 1)
    bf16 = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
    assert np.array_equal(scale, scale.astype(bf16).astype(np.float32)) and scheme.step(-1, 1)[0] > 0
    assert scheme.held(np.float32(1e-30)) > 0


def graph(op: str, opset: int, **attributes: Any) -> Any:
    nodes = [helper.make_node(op, ["x", "g"][: 2 if op == "GridSample" else 1], ["y"], name="this", **attributes)]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, [1, 1, 4, 4]), value("g", TensorProto.FLOAT, [1, 4, 4, 2])]
    made = helper.make_graph(nodes, "g", inputs, [value("y", TensorProto.FLOAT, None)])
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def test_operator_sets_are_raised() -> None:
    """An old graph must be converted, a newer one be taken as it is, and an operator of another meaning be named."""
    old = raise_opset(graph("ReduceSum", 13), 21)
    assert (old.opset_import[0].version, old.ir_version) == (21, 10)
    onnx.checker.check_model(old)
    assert raise_opset(graph("Relu", 22), 21).opset_import[0].version == 22
    with pytest.raises(InputRefused) as caught:
        raise_opset(graph("GridSample", 16, mode="bilinear"), 21)
    assert (caught.value.code, caught.value.detail) == ("DT310", ("operator GridSample, node this",))
    assert raise_opset(graph("GridSample", 18, mode="bilinear"), 19).opset_import[0].version == 19
    body = graph("GridSample", 18, mode="bilinear").graph
    del body.input[:]
    with pytest.raises(InputRefused, match="1 operators"):
        raise_opset(graph("If", 18, then_branch=body, else_branch=graph("Relu", 18).graph), 21)


def test_masks_keep_finite_in_bf16(tmp_path: Path) -> None:
    """The largest float is no bf16 number: a mask of it must become the largest of those, not infinity."""
    from deploytool.backends.onnx_fp16 import write_bf16

    model = graph("Relu", 18)
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(helper.make_node("Add", ["h", "mask"], ["y"], name="add"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(np.finfo(np.float32).min), "mask"))
    onnx.save(model, tmp_path / "a.onnx")
    write_bf16(tmp_path / "a.onnx", (), tmp_path / "b.onnx")
    mask = next(t for t in onnx.load(tmp_path / "b.onnx").graph.initializer)
    assert mask.data_type == TensorProto.BFLOAT16 and np.isfinite(numpy_helper.to_array(mask).astype(np.float32)).all()

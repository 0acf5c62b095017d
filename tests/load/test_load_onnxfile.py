"""ONNX files as models: what is taken, at which sizes, and what is refused with which words."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")

import onnx  # noqa: E402
import onnx.parser  # noqa: E402
import tiny_onnx  # noqa: E402
from onnx import TensorProto, helper  # noqa: E402

from deploytool.errors import DeployError, InputRefused, UsageProblem  # noqa: E402
from deploytool.load.describe import describe_job  # noqa: E402
from deploytool.load.made_samples import index_bound, made_samples  # noqa: E402
from deploytool.load.model import open_source  # noqa: E402
from deploytool.load.resolve import resolve  # noqa: E402
from deploytool.signature import Outputs, TensorSpec  # noqa: E402
from deploytool.source import ModelRef, Source  # noqa: E402


def opened(path: Path, samples: Path | None = None) -> Source:
    return open_source(resolve(str(path), samples))


def text_sample(path: Path, batch: int = 2, length: int = 5, **changed: np.ndarray) -> Path:
    ids = np.arange(batch * length).reshape(batch, length)
    np.savez(path, **{"input_ids": ids, "attention_mask": np.ones_like(ids), **changed})
    return path


def test_the_graph_is_its_own_reference(tmp_path: Path) -> None:
    """Signature, outputs and sizes must be the graph's own; without samples, they are made and called synthetic."""
    source = opened(tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx"))
    free = "int64[batch_size, sequence_length]"
    assert [str(spec) for spec in source.signature.inputs] == [f"input_ids: {free}", f"attention_mask: {free}"]
    assert [str(spec) for spec in source.signature.outputs] == ["logits: float32[batch_size, sequence_length, 8]"]
    assert source.synthetic and not source.ref.has_module
    samples = list(source.samples())
    assert len({tuple(s["input_ids"].shape) for s in samples}) >= 3
    weights = {t.name: torch.from_numpy(onnx.numpy_helper.to_array(t).copy()) for t in tiny_onnx_weights(tmp_path)}
    for sample in samples:
        seen = weights["table"][sample["input_ids"]] * sample["attention_mask"][..., None]
        expected = (seen @ weights["weight"]).relu()
        torch.testing.assert_close(source.flat(*sample.values())[0], expected, rtol=1e-5, atol=1e-5)


def tiny_onnx_weights(folder: Path) -> list[onnx.TensorProto]:
    return list(onnx.load(folder / "m.onnx").graph.initializer)


def test_made_samples_stay_in_the_range_of_the_table(tmp_path: Path) -> None:
    """Token ids must reach over the whole table that they look up in and not beyond; a mask is 0 and 1."""
    source = opened(tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx"))
    assert index_bound(tiny_onnx.text_model().graph, "input_ids") == 100
    assert index_bound(tiny_onnx.text_model().graph, "attention_mask") is None
    ids = torch.cat([s["input_ids"].flatten() for s in source.samples()])
    assert 0 <= int(ids.min()) < 20 and 80 < int(ids.max()) < 100
    assert {0, 1} == set(torch.cat([s["attention_mask"].flatten() for s in source.samples()]).tolist())


@pytest.mark.parametrize("total", ["total", "past + new"])
def test_sizes_that_depend_on_each_other_are_found(tmp_path: Path, total: str) -> None:
    """Where a dimension must be the sum of two others, sizes must be found that fit, with its formula or without."""
    source = opened(tiny_onnx.save(tiny_onnx.sums_model(total), tmp_path / "m.onnx"))
    assert {"batch", "new", "past", total} == set(source.signature.free)
    for sample in source.samples():
        assert sample["mask"].shape[1] == sample["past"].shape[1] + sample["x"].shape[1]


def test_old_files_are_taken(tmp_path: Path) -> None:
    """Weights that are listed as inputs are none, and a first axis without a name is the batch."""
    source = opened(tiny_onnx.save(tiny_onnx.image_model(), tmp_path / "m.onnx"))
    assert [str(spec) for spec in source.signature.inputs] == ["x: float32[batch, 3, h, w_]"]
    assert [str(spec) for spec in source.signature.outputs] == ["y: float32[batch, 10]"]


def test_external_weights(tmp_path: Path) -> None:
    """Weights beside the graph must be read, and be a part of what the model was made from."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx", external=True)
    assert (tmp_path / "weights.bin").stat().st_size > 10_000
    assert opened(path).dependencies == (path, tmp_path / "weights.bin")


def test_a_files_weights_are_described(tmp_path: Path) -> None:
    """inspect must tell every weight with the operator that reads it."""
    about = describe_job(vars(resolve(str(tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx")))))
    assert about["parameters"] == 100 * 32 + 32 * 8 + 1 and about["size_bytes"] == 4 * (3200 + 256) + 8
    assert {row["name"]: row["kind"] for row in about["layers"]} == {"table": "Gather", "weight": "MatMul",
                                                                     "two": "Unsqueeze"}  # fmt: skip


def test_samples_of_the_user(tmp_path: Path) -> None:
    """A file, a folder, and recorded cases must be taken as they are, and the model is not synthetic then."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx")
    one = text_sample(tmp_path / "one.npz")
    assert not opened(path, one).synthetic
    folder = tmp_path / "many"
    folder.mkdir()
    for index in range(3):
        text_sample(folder / f"{index}.npz", 1 + index, 4 + index)
    source = opened(path, folder)
    assert [s["input_ids"].shape[1] for s in source.samples()] == [4, 5, 6]
    assert {folder / f"{i}.npz" for i in range(3)} < set(source.dependencies)
    ids = np.ones((2, 3), np.int64)
    np.savez(tmp_path / "case.npz", **{"in.input_ids": ids, "in.attention_mask": ids, "ref.logits": ids})
    assert len(list(opened(path, tmp_path / "case.npz").samples())) == 1


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    """Wrong names, types, values and files must be refused as samples, not met as a crash."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "m.onnx")
    wrong = tmp_path / "wrong.npz"
    for changed in ({"input_ids": np.ones((2, 5), np.float32)}, {"more": np.ones(1)},
                    {"input_ids": np.ones((2, 6), np.int64)}):  # fmt: skip
        with pytest.raises(InputRefused) as caught:
            opened(path, text_sample(wrong, **changed))
        assert caught.value.code == "DT303"
    with pytest.raises(InputRefused, match="ONNX Runtime must run"):
        opened(path, text_sample(wrong, input_ids=np.full((2, 5), 100)))
    np.savez(wrong, a=np.array([{}], dtype=object))
    for content in (wrong.read_bytes(), b"", b"PK\x03\x04cut"):
        wrong.write_bytes(content)
        with pytest.raises(InputRefused) as caught:
            opened(path, wrong)
        assert caught.value.code == "DT303"
    (tmp_path / "none").mkdir()
    with pytest.raises(InputRefused, match="folder without any"):
        opened(path, tmp_path / "none")
    with pytest.raises(UsageProblem, match="folder of such files"):
        opened(path, tmp_path / "missing.npz")
    with pytest.raises(UsageProblem, match="brings its own"):
        resolve("digits", wrong)


def refused(path: Path) -> DeployError:
    with pytest.raises(InputRefused) as caught:
        opened(path)
    return caught.value


def test_broken_files_are_refused(tmp_path: Path) -> None:
    """Empty, cut, foreign and graphless files must be refused as DT307, wherever they were cut."""
    whole = tiny_onnx.text_model().SerializeToString()
    for content in (b"", whole[:10], whole[: len(whole) // 2], whole[:-5], b"\x08\x08", b"<html>", b"x" * 500):
        (tmp_path / "m.onnx").write_bytes(content)
        assert refused(tmp_path / "m.onnx").code == "DT307"


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    """A custom operator must be named with its domain, a future operator set and NaN weights be refused."""
    node = helper.make_node("Foo", ["x"], ["y"], domain="com.acme")
    values = [("x", TensorProto.FLOAT, ["b", 4])], [("y", TensorProto.FLOAT, ["b", 4])]
    error = refused(tiny_onnx.save(tiny_onnx.graph([node], *values, {}, domain="com.acme"), tmp_path / "m.onnx"))
    assert error.code == "DT310" and "com.acme" in error.message and error.detail == ("com.acme::Foo",)
    assert refused(tiny_onnx.save(tiny_onnx.text_model(opset=99), tmp_path / "m.onnx")).code in ("DT307", "DT310")
    model = tiny_onnx.text_model()
    broken = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    broken[0, 0] = np.nan
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(broken, "table"))
    for external in (False, True):
        error = refused(tiny_onnx.save(model, tmp_path / "m.onnx", external=external))
        assert error.code == "DT304" and error.detail == ("table",)


def test_external_weights_elsewhere_are_refused(tmp_path: Path) -> None:
    """Weights outside the folder, behind a link, missing or cut must be refused before anything reads them."""
    path = tiny_onnx.save(tiny_onnx.text_model(), tmp_path / "in" / "m.onnx", external=True)
    data = path.with_name("weights.bin")
    content = data.read_bytes()
    for location in ("../weights.bin", str(tmp_path / "weights.bin")):
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = location if entry.key == "location" else entry.value
        (tmp_path / "weights.bin").write_bytes(content)
        (tmp_path / "in" / "out.onnx").write_bytes(model.SerializeToString())
        assert "must lie beside it" in refused(tmp_path / "in" / "out.onnx").message
    data.write_bytes(content[:-4])
    assert "ends before" in refused(path).message
    data.unlink()
    assert refused(path).code == "DT307"
    os.symlink(tmp_path / "weights.bin", data)
    assert refused(path).code == "DT307"


def test_a_graph_that_runs_at_no_size_asks_for_samples(tmp_path: Path) -> None:
    """Where no made sample runs, the error must say so and name the option."""
    node = helper.make_node("Reshape", ["x", "s"], ["y"])
    model = tiny_onnx.graph([node], [("x", TensorProto.FLOAT, ["n"])], [("y", TensorProto.FLOAT, [7, None])],
                            {"s": np.array([7, 13])})  # fmt: skip
    error = refused(tiny_onnx.save(model, tmp_path / "m.onnx"))
    assert error.code == "DT303" and "--samples" in str(error.fix)


def test_old_references_still_read() -> None:
    """What artifacts recorded before models could have samples must still name a model."""
    assert ModelRef(kind="python", name="m", path="/m.py").samples is None


NORM = """
<ir_version: 8, opset_import: ["" : 14]>
norm (float[batch, 6] x) => (float[batch, 6] y)
<float[6] weight = {1, 2, 3, 4, 5, 6}, float[6] bias = {0, 1, 0, 1, 0, 1}, float two = {2}, float small = {0.00001}>
{
    mean = ReduceMean <axes = [-1]> (x)
    centred = Sub (x, mean)
    squared = Pow (centred, two)
    variance = ReduceMean <axes = [-1]> (squared)
    safe = Add (variance, small)
    deviation = Sqrt (safe)
    scaled = Div (centred, deviation)
    weighted = Mul (scaled, weight)
    y = Add (weighted, bias)
}
"""


def test_what_onnx_runtime_saved_is_taken(tmp_path: Path) -> None:
    """A graph that ONNX Runtime fused and saved, which ONNX's checker does not know, must be a model like others."""
    path = tmp_path / "fused.onnx"
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(path), 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    plain = onnxruntime.InferenceSession(onnx.parser.parse_model(NORM).SerializeToString(), options)
    assert [node.op_type for node in onnx.load(path).graph.node] == ["LayerNormalization"]
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(str(path))
    source = opened(path)
    assert len(source.notes) == 1 and "No Op registered for LayerNormalization" in source.notes[0]
    for sample in source.samples():
        (expected,) = plain.run(None, {"x": sample["x"].numpy()})
        torch.testing.assert_close(source.flat(sample["x"])[0], torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


def test_what_neither_knows_is_refused(tmp_path: Path) -> None:
    """An operator that ONNX's checker and ONNX Runtime do not have must be refused, with the words of both."""
    model = onnx.parser.parse_model(NORM)
    model.graph.node[5].op_type = "Mystery"
    path = tmp_path / "broken.onnx"
    path.write_bytes(model.SerializeToString())
    error = refused(path)
    assert error.code == "DT307" and "Mystery" in error.message and "ONNX Runtime must open" in error.detail[0]


@pytest.mark.parametrize("fused", [False, True])
def test_an_unsorted_graph_is_refused(tmp_path: Path, fused: bool) -> None:
    """Nodes before those that they read must be refused, as must those behind an operator unknown to the checker."""
    model = tiny_onnx.text_model(opset=16)
    model.graph.node.insert(4, model.graph.node.pop())
    if fused:
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(8, np.float32), "scale"))
        model.graph.node.insert(0, helper.make_node("LayerNormalization", ["weight", "scale"], ["unread"]))
    assert [node.op_type for node in model.graph.node][-2:] == ["Relu", "MatMul"]
    error = refused(tiny_onnx.save(model, tmp_path / "m.onnx"))
    assert error.code == "DT307" and "'y'" in error.message


@pytest.mark.parametrize("batches", [3, 1])
def test_a_decoders_sizes_are_never_at_odds(batches: int) -> None:
    """Mask and positions must fit the tokens and the cache in whatever is tried; in batches where the graph runs so."""
    shapes = {"input_ids": ("batch", "new"), "attention_mask": ("batch", "all"), "position_ids": ("batch", "new"),
              "past_key_values.0.key": ("batch", 2, "old", 4)}  # fmt: skip
    inputs = [TensorSpec(name, "float32" if "past" in name else "int64", shape) for name, shape in shapes.items()]

    def objection(feeds: Outputs) -> str:
        (rows, new), old = feeds["input_ids"].shape, feeds["past_key_values.0.key"].shape[2]
        assert feeds["attention_mask"].shape == (rows, old + new) and feeds["attention_mask"].all()
        assert (feeds["position_ids"] == np.arange(old, old + new)).all() and len(feeds["position_ids"]) == rows
        return "too many rows" if rows > batches else ""

    samples = made_samples(onnx.GraphProto(), inputs, objection)
    assert max(len(sample["input_ids"]) for sample in samples) == batches
    assert len({sample["input_ids"].shape[1] for sample in samples}) >= 3
    assert len({sample["past_key_values.0.key"].shape[2] for sample in samples}) >= 3


DECODER: dict[str, tuple[int | str, ...]] = {
    "input_ids": ("batch", "new"), "attention_mask": ("batch", "all"), "position_ids": ("batch", "new"),
    "past_key_values.0.key": ("batch", 2, "old", 4), "past_key_values.0.value": ("batch", 2, "old", 4)}  # fmt: skip


@pytest.mark.parametrize(("changed", "rows", "new"), [
    ({"past_key_values.0.key": ("batch", 2, "a", 4), "past_key_values.0.value": ("batch", 2, "b", 4)}, None, None),
    ({"attention_mask": ("mask_rows", "attention_mask_dim1")}, None, None),
    ({"input_ids": ("batch", 1), "position_ids": ("batch", 1), "attention_mask": ("batch", "old + 1")}, None, 1),
    ({"input_ids": (2, "new")}, 2, None), ({"input_ids": ("batch", 4)}, None, 4),
    ({"use_cache_branch": (1,), "embeds": ("n", 3)}, None, None),
])  # fmt: skip
def test_a_decoders_dimensions_need_no_names(
    changed: dict[str, tuple[int | str, ...]], rows: int | None, new: int | None
) -> None:
    """Axes without a common name, a cache per layer and fixed sizes must be given sizes that agree."""
    shapes = DECODER | changed
    inputs = [TensorSpec(n, "int64" if n in list(DECODER)[:3] else "float32", shape) for n, shape in shapes.items()]

    def objection(feeds: Outputs) -> str:
        (b, t), old = feeds["input_ids"].shape, feeds["past_key_values.0.key"].shape[2]
        assert b == (rows or b) and t == (new or t)
        assert feeds["attention_mask"].shape == (b, old + t) and feeds["attention_mask"].all()
        assert feeds["position_ids"].shape == (b, t) and (feeds["position_ids"] == np.arange(old, old + t)).all()
        assert feeds["past_key_values.0.value"].shape == feeds["past_key_values.0.key"].shape == (b, 2, old, 4)
        return ""

    assert len(made_samples(onnx.GraphProto(), inputs, objection)) == 8


@pytest.mark.parametrize("changed", [
    {"encoder_hidden_states": ("batch", "encoder_sequence", 8)}, {"cache_position": ("other",)},
    {"past_key_values.0.key": ("batch", "past_key_values.0.key_dim1", "old", 4)}, {"attention_mask": ("batch", "new")},
    {"attention_mask": ("batch", 16)}, {"position_ids": (3, "batch", "new")},
])  # fmt: skip
def test_a_decoder_with_further_dimensions_gets_samples(changed: dict[str, tuple[int | str, ...]]) -> None:
    """What the four counts do not explain must be tried at sizes like any other graph's."""
    inputs = [TensorSpec(name, "float32", shape) for name, shape in (DECODER | changed).items()]
    samples = made_samples(onnx.GraphProto(), inputs, lambda feeds: "")
    for spec in inputs:
        assert samples[0][spec.name].ndim == len(spec.shape)

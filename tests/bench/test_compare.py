"""The comparison end to end: real processes, runners whose speed is planted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.bench import energy
from deploytool.bench.blocks import Block
from deploytool.bench.compare import _Session, compare
from deploytool.bench.energy import Meter
from deploytool.bench.environment import usable_cores
from deploytool.bench.noise import ITSELF, noise_floor
from deploytool.bench.statistics import MIN_BLOCKS
from deploytool.bench.throughput import throughput
from deploytool.cases import Case
from deploytool.errors import BackendFailed, InputRefused
from deploytool.signature import Signature, TensorSpec
from deploytool.worker import Limits

OPENER = "planted:open_planted"
LIMITS = Limits(seconds=60, memory_bytes=2_000_000_000)
SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),))


@pytest.fixture(autouse=True)
def child_finds_planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Child processes import the planted runners from this folder, and keep their logs in a folder of the test."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def artifact(tmp_path: Path) -> Callable[..., Artifact]:
    """Makes an artifact whose runner has the given settings."""

    def make(name: str, **settings: object) -> Artifact:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "engine.bin").write_bytes(b"planted")
        return Artifact(folder, "planted", "onnx", "engine.bin", "fp32", SIGNATURE, settings=settings).save()

    return make


@pytest.fixture
def case(tmp_path: Path) -> Path:
    path = tmp_path / "case.npz"
    Case({"x": np.ones((2, 4), dtype=np.float32)}).save(path)
    return path


def test_gross_difference(artifact: Callable[..., Artifact], case: Path) -> None:
    """A candidate that takes a third of the time is called faster, unless the machine is noisy; the result is JSON."""
    said: list[str] = []
    result = compare(artifact("new", seconds=0.002), {"old": artifact("old", seconds=0.006)}, case,
                     limits=LIMITS, budget_seconds=4, seed=0, report=said.append, opener=OPENER)  # fmt: skip
    json.dumps(result, allow_nan=False)
    against = result["against"]["old"]
    assert against["verdict"] in ("faster", "undecided"), result
    if result["blocks"] >= MIN_BLOCKS:
        assert against["speedup_ci"][0] <= against["speedup"] <= against["speedup_ci"][1]
        assert against["speedup"] > 1.5
    else:
        assert against["verdict"] == "undecided" and result["disturbed_blocks"] > 0
    assert against["p50_ms"] > result["p50_ms"] > 0
    assert result["runs"] >= 10
    assert 0 < result["load_s"] * 1e3 < result["cold_start_ms"]
    assert result["environment"]["foreign_load_cores"] >= 0
    assert said


def test_peak_memory_is_each_process_own(artifact: Callable[..., Artifact], case: Path) -> None:
    """The peak of a process that holds 200 MB more is at least 150 MB higher."""
    lean = artifact("lean", seconds=0.001)
    heavy = artifact("heavy", seconds=0.001, ballast_bytes=200_000_000)
    result = compare(lean, {"heavy": heavy}, case, limits=LIMITS, budget_seconds=0.5, seed=0, opener=OPENER)
    assert result["against"]["heavy"]["peak_rss_bytes"] - result["peak_rss_bytes"] > 150_000_000
    assert result["peak_rss_bytes"] < 150_000_000


def test_energy_is_told_where_it_can_be_read(
    artifact: Callable[..., Artifact], case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With counters every process has its joules per run; without, none, and the environment says why."""
    monkeypatch.setattr(Meter.__init__, "__defaults__", (tmp_path / "rapl",))
    how = {"limits": LIMITS, "budget_seconds": 0.5, "seed": 0, "opener": OPENER}
    one, other = artifact("one", seconds=0.01), artifact("other", seconds=0.01)
    dark = compare(one, {"other": other}, case, **how)
    assert dark["joules_per_run"] is None and dark["against"]["other"]["joules_per_run"] is None
    assert dark["environment"]["energy"].startswith("unavailable: energy counters must be readable")
    zone = tmp_path / "rapl" / "intel-rapl:0"
    zone.mkdir(parents=True)
    for name in ("energy_uj", "max_energy_range_uj"):
        (zone / name).write_text("1000000")
    (zone / "name").write_text("package-0")
    monkeypatch.setattr(Meter, "lap", lambda self: 2.0)
    seen = compare(one, {"other": other}, case, **how)
    assert seen["environment"]["energy"] == "RAPL"
    for figures in (seen, seen["against"]["other"]):
        assert 0.05 < figures["joules_per_run"] <= 2.0  # 2 J a turn of at most some twenty runs
        assert figures["gpu_joules_per_run"] is None
    assert seen["environment"]["gpu_energy"].startswith("not read: nothing here runs on")


class _Gpus:
    """A counter of GPUs that goes up by three joules from lap to lap."""

    def lap(self) -> float:
        return 3.0


def test_what_runs_on_a_gpu(artifact: Callable[..., Artifact], case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine of a GPU has the GPU's joules and no threads of its own; what runs on the CPU has no such joules."""
    engine = replace(artifact("engine", seconds=0.01), format="tensorrt").save()
    how = {"limits": LIMITS, "budget_seconds": 0.5, "seed": 0, "opener": OPENER}
    other = artifact("other", seconds=0.01, threads=1)
    monkeypatch.setattr(energy, "_NVML", "libno-such-nvml.so.1")
    dark = compare(engine, {"other": other}, case, **how)
    assert dark["gpu_joules_per_run"] is None and "libno-such-nvml" in dark["environment"]["gpu_energy"]
    monkeypatch.setattr(energy, "GpuMeter", _Gpus)
    seen = compare(engine, {"other": other}, case, **how)
    assert seen["environment"]["gpu_energy"] == "NVML" and 0.05 < seen["gpu_joules_per_run"] <= 3.0
    assert seen["against"]["other"]["gpu_joules_per_run"] is None
    assert (seen["threads"], seen["against"]["other"]["threads"]) == (None, 1)


def test_threads_are_told(artifact: Callable[..., Artifact], case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each side says how many threads its engine runs with: what its settings say, else the cores that it takes."""
    monkeypatch.setattr("deploytool.backends.engine.psutil.cpu_count", lambda logical=True: usable_cores())
    two, free = artifact("two", seconds=0.001, threads=2), artifact("free", seconds=0.001)
    result = compare(two, {"free": free}, case, limits=LIMITS, budget_seconds=0.2, seed=0, opener=OPENER)
    assert (result["threads"], result["against"]["free"]["threads"]) == (2, usable_cores())


def test_alone(artifact: Callable[..., Artifact], case: Path) -> None:
    """Without a reference the candidate's times are told and nothing is compared."""
    result = compare(artifact("only", seconds=0.001), {}, case, limits=LIMITS, budget_seconds=0.5, seed=0,
                     opener=OPENER)  # fmt: skip
    assert result["against"] == {} and result["p50_ms"] >= 1.0


@pytest.mark.parametrize(("second", "confirmed"), [(1.05, True), (1.0, False), (0.95, False)])
def test_small_claims_are_confirmed(
    second: float, confirmed: bool, artifact: Callable[..., Artifact], case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A claim of 5 % stands only when fresh processes show it too; else it is undecided, and a note says why."""
    sessions: list[list[str]] = []

    def blocks(self: Any, references: dict[str, Artifact], seed: int) -> Any:
        ratio = second if sessions else 1.05
        sessions.append(sorted(references))
        made = [Block(name, "ABBA", ((10.0,), (10.0,)), ((10 * ratio + (i - 5.5) / 100,),) * 2, (1.0, 1.0))
                for name in references for i in range(12)]  # fmt: skip
        return made, {name: {"load_s": 1.0} for name in ("", *references)}, {}

    monkeypatch.setattr(_Session, "measure", blocks)
    result = compare(artifact("new"), {"old": artifact("old")}, case, limits=LIMITS, budget_seconds=4, seed=0)
    against = result["against"]["old"]
    assert sessions == [["old"], ["old"]]
    assert (against["verdict"], against["confirmed"]) == (("faster", True) if confirmed else ("undecided", False))
    assert any("not seen again" in note for note in result["notes"]) is not confirmed


@pytest.mark.parametrize(("ms", "ratio", "times"), [(10.0, 1.2, 1), (0.3, 1.4, 2), (0.3, 2.0, 1)])
def test_large_claims_need_no_confirmation(
    ms: float, ratio: float, times: int, artifact: Callable[..., Artifact], case: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth is measured once; of runs as short as processes alone make differ by a third, only a factor of two."""
    block = Block("old", "ABBA", ((ms,), (ms,)), ((ms * ratio,), (ms * ratio,)), (1.0, 1.0))
    calls: list[int] = []
    monkeypatch.setattr(_Session, "measure", lambda self, references, seed: (
        calls.append(seed), ([block] * 8, {"": {}, "old": {}}, {}))[1])  # fmt: skip
    result = compare(artifact("new"), {"old": artifact("old")}, case, limits=LIMITS, budget_seconds=4, seed=3)
    assert calls == [3, 4][:times] and result["against"]["old"]["confirmed"] is (True if times == 2 else None)


def test_noise_of_itself(artifact: Callable[..., Artifact], case: Path) -> None:
    """An artifact against itself gives a noise floor, and is not called faster or slower."""
    one = artifact("one", seconds=0.002)
    timed = compare(one, {ITSELF: one}, case, limits=LIMITS, budget_seconds=2, seed=0, opener=OPENER)
    noise = noise_floor(timed)
    assert (noise["detectable"] or 0.0) >= 0 and noise["run_noise"] >= 0
    assert noise["verdict"] in ("same", "undecided")


def test_throughput(artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    """A runner that takes as long for eight items as for one has eight times the throughput."""
    (tmp_path / "cases").mkdir()
    Case({"x": np.ones((2, 4), dtype=np.float32)}).save(tmp_path / "cases" / "000.npz")
    one, eight = throughput(artifact("one", seconds=0.005), tmp_path / "cases", [1, 8], tmp_path / "made", LIMITS,
                            seconds=0.4, seed=0, opener=OPENER)  # fmt: skip
    assert (one["batch"], eight["batch"]) == (1, 8) and one["runs"] >= 4
    assert eight["items_per_s"] == pytest.approx(8e3 / eight["p50_ms"])
    assert one["p50_ms"] >= 5


@pytest.mark.parametrize(("fails", "code"), [("crash", "DT501"), ("hang", "DT502")])
def test_failing_engine_is_one_error(
    artifact: Callable[..., Artifact], case: Path, fails: str, code: str, tmp_path: Path
) -> None:
    """An engine that crashes or hangs ends the comparison with its error, and leaves no process."""
    bad = artifact("bad", seconds=0.001, fails=fails)
    with pytest.raises(BackendFailed) as caught:
        compare(bad, {}, case, limits=Limits(seconds=3), budget_seconds=0.5, seed=0, opener=OPENER)
    assert caught.value.code == code


def test_case_that_does_not_fit_is_refused(artifact: Callable[..., Artifact], tmp_path: Path) -> None:
    """A case with foreign inputs, or none, is refused instead of timed."""
    for name, inputs in (("foreign", {"z": np.ones(3, dtype=np.float32)}), ("empty", {})):
        Case(inputs).save(tmp_path / f"{name}.npz")
        with pytest.raises(InputRefused):
            compare(artifact(name, seconds=0.001), {}, tmp_path / f"{name}.npz", limits=LIMITS,
                    budget_seconds=0.5, seed=0, opener=OPENER)  # fmt: skip

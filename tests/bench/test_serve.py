"""What runs inside a measured process, here in our own."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import Planted

from deploytool.artifact import Artifact
from deploytool.bench.serve import Guard, Served
from deploytool.cases import Case
from deploytool.errors import InputRefused, IntegrityBroken
from deploytool.signature import Signature, TensorSpec


def serve(folder: Path, override: int | None = None, **settings: Any) -> Served:
    """A served runner with the given settings."""
    signature = Signature((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))
    folder.mkdir(exist_ok=True)
    (folder / "engine.bin").write_bytes(b"planted")
    Artifact(folder, "planted", "onnx", "engine.bin", "fp32", signature,
             settings={"seconds": 0.001, **settings}).save()  # fmt: skip
    Case({"x": np.ones(2, dtype=np.float32)}).save(folder.with_suffix(".npz"))
    replaced = {"threads": override} if override else None
    return Served(str(folder), str(folder.with_suffix(".npz")), settings=replaced, opener="planted:open_planted")


def test_counts_of_runs(tmp_path: Path) -> None:
    """A block runs at least once and at most as often as allowed; warming ends by itself."""
    served = serve(tmp_path)
    assert len(served.time_block(0)) == 1
    assert len(served.time_block(3600, max_runs=7)) == 7
    assert len(served.time_block(0, min_runs=3)) == 3
    assert served.warm_up(0, max_runs=1) >= 1.0
    assert all(t >= 1.0 for t in served.time_block(0.05))


def test_collector_rests_only_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The garbage collector is off while runs are timed, and on afterwards, also when a run fails."""
    served = serve(tmp_path)
    seen: list[bool] = []

    def run(self: Planted, feeds: object) -> dict[str, np.ndarray]:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise ValueError("planted")
        return {}

    monkeypatch.setattr(Planted, "run", run)
    served.time_block(0)
    assert gc.isenabled()
    with pytest.raises(ValueError, match="planted"):
        served.time_block(10)
    assert seen == [False] * 3 and gc.isenabled() and gc.get_freeze_count() == 0


def test_settings_replace_the_artifacts_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given settings reach the opener in place of the artifact's; without them its own stay."""
    seen: list[Any] = []

    class Recording(Planted):
        def __init__(self, artifact: Artifact):
            super().__init__(artifact)
            seen.append(artifact.settings["threads"])

    monkeypatch.setattr("planted.Planted", Recording)
    serve(tmp_path / "first", override=1, threads=5)
    serve(tmp_path / "second", threads=5)
    assert seen == [1, 5]


def test_refuses_a_changed_artifact(tmp_path: Path) -> None:
    """An artifact whose files changed is not timed."""
    serve(tmp_path)
    (tmp_path / "engine.bin").write_bytes(b"changed")
    with pytest.raises(IntegrityBroken):
        Served(str(tmp_path), str(tmp_path.with_suffix(".npz")), opener="planted:open_planted")


def test_refuses_a_case_without_inputs(tmp_path: Path) -> None:
    """A case that holds no inputs is refused."""
    serve(tmp_path)
    Case({}).save(tmp_path.parent / "none.npz")
    with pytest.raises(InputRefused, match="hold inputs"):
        Served(str(tmp_path), str(tmp_path.parent / "none.npz"), opener="planted:open_planted")


def test_loading_and_memory(tmp_path: Path) -> None:
    """The cold start holds the loading and the first run; the peak is a plausible number of bytes."""
    served = serve(tmp_path, seconds=0.05)
    loading = served.loading()
    assert loading["cold_start_ms"] >= loading["load_s"] * 1e3 + 50
    assert served.memory()["peak_rss_bytes"] > 10_000_000


def test_a_devices_own_clock_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a device took must be told where the runner knows it, without the runs that warmed it, and only there."""
    served = serve(tmp_path)
    assert served.device() == {"device_ms": None}
    told = iter([5.0, 0.25])
    monkeypatch.setattr(served._runner, "device_ms", lambda: next(told), raising=False)
    served.warm_up(0, max_runs=2)
    served.time_block(0)
    assert served.device() == {"device_ms": 0.25}


def test_rest_ends(tmp_path: Path) -> None:
    """Waiting for idle threads ends at once when there are none, and after a while when they never sleep."""
    served = serve(tmp_path)
    assert served.rest() > 0
    busy = True

    def spin() -> None:
        while busy:
            pass

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        start = time.perf_counter()
        waited = served.rest()
        assert 0.5 <= waited <= time.perf_counter() - start
    finally:
        busy = False
        thread.join()


def test_guard_measures_more_work_as_longer() -> None:
    """The guard kernel is real work: sixty-four times the arithmetic takes longer, the quickest of ten runs of each."""
    large, small = (Guard(1, size=size, products=4) for size in (256, 64))
    assert min(large.kernel() for _ in range(10)) > min(small.kernel() for _ in range(10)) > 0


def test_takes_another_case(tmp_path: Path) -> None:
    """After `take` the inputs of the other case run, after three runs that are not timed."""
    served = serve(tmp_path / "sizes")
    seen: list[float] = []
    run = served._runner.run
    served._runner.run = lambda feeds: (seen.append(float(feeds["x"][0])), run(feeds))[1]  # type: ignore[method-assign]
    Case({"x": np.full(2, 5, dtype=np.float32)}).save(tmp_path / "five.npz")
    served.take(str(tmp_path / "five.npz"))
    assert seen == [5, 5, 5]
    assert len(served.time_block(0.0, min_runs=2)) == 2 and seen == [5] * 5

"""The comparison on simulated traces of disturbed machines: no false alarm, and a slowdown is never called faster."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "timing_aa.py"
TRIALS = 6


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark script as a module."""
    spec = importlib.util.spec_from_file_location("timing_aa", SCRIPT)
    assert spec and spec.loader
    sys.modules["timing_aa"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["timing_aa"])
    yield sys.modules["timing_aa"]
    del sys.modules["timing_aa"]


def test_no_false_alarm_and_no_slowdown_called_faster(script: ModuleType) -> None:
    """Equal programs are never called faster or slower under four kinds of noise, where means of 20 runs often are."""
    result = script.compared(script.Simulated, TRIALS)
    assert result["false_alarms"]["ours"] == 0 < result["false_alarms"]["usual"]
    assert result["called_faster"]["ours"] == 0
    assert result["found_or_undecided"]["ours"] >= 0.95
    assert result["three_percent"]["idle"]["ours"]["slower"] >= TRIALS - 1


def test_a_replay_keeps_what_was_planted(script: ModuleType) -> None:
    """Recorded blocks give back their own ratio, whichever side they are put on, and what is planted on top."""
    block = {"order": "ABBA", "a": [[10.0] * 30, [10.0] * 30], "b": [[10.0] * 30, [10.0] * 30], "guard": [1.0, 1.0]}
    for slowdown, verdict in ((0.0, "same"), (0.05, "slower")):
        session = script.Replayed([[block] * 12], slowdown, seed=0)
        assert script.judged(session, {"r": None}, 0)["against"]["r"]["verdict"] == verdict

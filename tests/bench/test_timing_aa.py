"""The comparison on simulated traces of disturbed machines: no false alarm, and a slowdown is never called faster."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from deploytool.bench import blocks
from deploytool.cli.bench import command

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "timing_aa.py"
TRIALS = 6
MINUTE = 60.0


def _block(a: float, b: float) -> dict[str, Any]:
    """A recorded block of so many milliseconds for each side."""
    return {"order": "ABBA", "a": [[a] * 30] * 2, "b": [[b] * 30] * 2, "guard": [1.0, 1.0]}


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
    longest = max(r["seconds_each"]["most"] for of in ("equal", "three_percent") for r in result[of].values())
    assert script.BUDGET_SECONDS < longest <= MINUTE


def test_no_comparison_takes_over_a_minute(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured and confirmed, both with all their overtime: opening, warming, runs and rests stay below a minute.

    As long as `deploytool bench` measures where nothing is said.
    """
    default = next(option.default for option in command.params if option.name == "seconds")
    monkeypatch.setattr(script, "BUDGET_SECONDS", default)
    monkeypatch.setattr(blocks, "undisturbed", lambda found: [])  # no block ever counts
    for regime in script.REGIMES:
        session = script.Simulated(regime, 0.03, seed=0)
        for seed in range(2):
            session.measure({"r": None}, seed)
        assert 4 * script.BUDGET_SECONDS < session.seconds <= MINUTE


def test_each_session_is_used_once(script: ModuleType) -> None:
    """With two sessions for each comparison, the first is measured whole and the second confirms; no other is read."""
    sessions = [[_block(10.0 + session, 20.0 + session)] * 6 for session in range(4)]
    for seed in range(2):
        session = script.Replayed(sessions, 0.0, seed, once=True)
        found = [session.measure({}, 0)[0] for _ in range(2)]
        assert [len(part) for part in found] == [6, 6]
        times = [{round(t) for b in part for t in (*b.candidate_ms[0], *b.reference_ms[1])} for part in found]
        assert times == [{10 + n, 20 + n} for n in (2 * seed, 2 * seed + 1)]
        assert {round(t) for runs in session.usual() for t in runs} == times[0]


def test_a_replay_keeps_what_was_planted(script: ModuleType) -> None:
    """Recorded blocks give back their own ratio, whichever side they are put on, and what is planted on top."""
    block = _block(10.0, 10.0)
    for slowdown, verdict in ((0.0, "same"), (0.05, "slower")):
        session = script.Replayed([[block] * 12], slowdown, seed=0)
        assert script.judged(session, {"r": None}, 0)["against"]["r"]["verdict"] == verdict

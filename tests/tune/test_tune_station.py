"""What a station does between the rounds of a race."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deploytool.artifact import Artifact
from deploytool.signature import Signature, TensorSpec
from deploytool.tune import station
from deploytool.tune.station import Station, Terms
from deploytool.tune.track import Entrant
from deploytool.worker import NO_LIMITS

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch",)),), (TensorSpec("y", "float32", ("batch",)),))


class RecordedTrack:
    """Rounds of so many milliseconds, and what was asked."""

    def __init__(self, ms: float):
        self.ms, self.asked = ms, list[str]()

    def __enter__(self) -> RecordedTrack:
        return self

    def __exit__(self, *error: object) -> None: ...

    def round(self, members: list[Entrant], rng: object) -> dict[str, Any]:
        self.asked.append("round")
        return {"ms": {m.key: [[self.ms, self.ms]] for m in members}, "joules": None, "guard": [1.0, 1.0]}

    def close(self, key: str) -> None:
        self.asked.append(f"close {key}")

    def clear(self) -> None:
        self.asked.append("clear")

    def peak_rss_bytes(self, entrant: Entrant) -> int:
        return 1


@pytest.mark.parametrize(
    ("ms", "count", "asked"),
    [
        (0.3, 3, ["round", "close e", "round", "close e", "round", "close e"]),
        (0.3, 6, ["round", "round", "close e", "round", "round", "close e", "round", "round", "close e"]),
        (9.0, 3, ["round", "round", "round", "close e"]),
    ],
)
def test_short_runs_race_in_three_processes(
    ms: float, count: int, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An entrant with short runs races in three processes, another one in one; a fresh round ends those before it."""
    track = RecordedTrack(ms)
    monkeypatch.setattr(station, "Track", lambda *arguments: track)
    artifact = Artifact(tmp_path, "planted", "onnx", "m", "fp32", SIGNATURE)
    entrant, anchor = Entrant("e", artifact, {}), Entrant("a", artifact, {})
    with Station(Terms(tmp_path, (), NO_LIMITS, 0)) as here:
        assert len(here.race(entrant, anchor, count, [0])["rounds"]) == count
        assert track.asked == asked
        here.round([entrant], [0])
        here.round([entrant], [0], fresh=True)
    assert track.asked[len(asked) :] == ["round", "clear", "round"]

"""A search that is killed and started again: it goes on, and nothing is measured twice."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

# A short search, whose last part has everything that keeps the quality in it, however slow.
SHORT = """
import math, sys
from deploytool.cli.main import run
from deploytool.tune import search

search._HEATS, search._NEAR, search._FINAL_ROUNDS = (2,), (math.inf,), 2
search._RACE_ROUNDS, search._BUILDS_TO_VARY = 1, 0
sys.exit(run(sys.argv[1:]))
"""
WHOLE = ("-m", "deploytool")


def start(how: tuple[str, ...], model: str, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, *how, "tune", model, "--target", "ort", "--target", "openvino",
               "--max-drop", "1.0", "--budget", "10m", "--bench-seconds", "0", "-o", str(out)]  # fmt: skip
    with log.open("ab") as sink:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)


def rows(out: Path) -> list[tuple[str, str, float]]:
    with closing(sqlite3.connect(f"file:{out / 'tune.sqlite'}?mode=ro", uri=True)) as database:
        return database.execute("SELECT key, kind, seconds FROM done ORDER BY rowid").fetchall()


def wait_for(kind: str, count: int, out: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    """Until so many rows of a kind, or of any, are written."""
    deadline = time.monotonic() + 240
    while not (out / "tune.sqlite").is_file() or sum(kind in (row[1], "any") for row in rows(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def killed_at(kind: str, count: int, how: tuple[str, ...], model: str, out: Path, log: Path) -> list[tuple[Any, ...]]:
    """Start a search and end it when so many rows of a kind are there; all that it has written."""
    killed = start(how, model, out, log)
    try:
        wait_for(kind, count, out, killed, log)
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    assert not (out / "deploytool.toml").exists()
    return rows(out)


@pytest.fixture
def installed() -> None:
    for module in ("torch", "onnxruntime", "openvino"):
        pytest.importorskip(module)


def test_killed_and_started_again(installed: None, model: str, tmp_path: Path) -> None:
    """After SIGKILL in the middle the next run keeps every finished row, adds the rest, and a third adds nothing."""
    out, log = tmp_path / "out", tmp_path / "log"
    before = killed_at("any", 3, WHOLE, model, out, log)
    assert start(WHOLE, model, out, log).wait(240) == 0, log.read_text()
    after = rows(out)
    assert after[: len(before)] == before and len(after) > len(before)
    assert {kind for _, kind, _ in after} >= {"build", "race", "quality"}
    chosen = json.loads((out / "tune.json").read_text())["chosen"]
    said = log.stat().st_size
    assert start(WHOLE, model, out, log).wait(240) == 0
    assert rows(out) == after
    again = log.read_text()[said:]
    assert "building" not in again and "racing" not in again and "evaluating" not in again
    assert json.loads((out / "tune.json").read_text())["chosen"] == chosen


def test_killed_in_the_last_rounds(installed: None, model: str, tmp_path: Path) -> None:
    """After SIGKILL between two rounds of a heat the next run builds and races nothing, and plays only those left."""
    out, log = tmp_path / "out", tmp_path / "log"
    before = killed_at("round", 1, ("-c", SHORT), model, out, log)
    said = log.stat().st_size
    assert start(("-c", SHORT), model, out, log).wait(240) == 0, log.read_text()
    again, after = log.read_text()[said:], rows(out)
    assert after[: len(before)] == before and len(after) > len(before)
    assert "building" not in again and "racing" not in again
    assert [kind for _, kind, _ in after].count("round") == 4  # two of the heat and two of the final

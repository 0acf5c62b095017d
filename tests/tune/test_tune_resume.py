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

import pytest


def start(model: str, out: Path, log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deploytool", "tune", model, "--target", "ort", "--target", "openvino",
               "--max-drop", "1.0", "--budget", "10m", "--bench-seconds", "0", "-o", str(out)]  # fmt: skip
    with log.open("ab") as sink:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sink)


def rows(out: Path) -> list[tuple[str, str, float]]:
    with closing(sqlite3.connect(f"file:{out / 'tune.sqlite'}?mode=ro", uri=True)) as database:
        return database.execute("SELECT key, kind, seconds FROM done ORDER BY rowid").fetchall()


def wait_for(count: int, out: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not (out / "tune.sqlite").is_file() or len(rows(out)) < count:
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_killed_and_started_again(model: str, tmp_path: Path) -> None:
    """After SIGKILL in the middle the next run keeps every finished row, adds the rest, and a third adds nothing."""
    for module in ("torch", "onnxruntime", "openvino"):
        pytest.importorskip(module)
    out, log = tmp_path / "out", tmp_path / "log"
    killed = start(model, out, log)
    try:
        wait_for(3, out, killed, log)
        os.kill(killed.pid, signal.SIGKILL)
    finally:
        killed.kill()
        killed.wait()
    before = rows(out)
    assert not (out / "deploytool.toml").exists()
    assert start(model, out, log).wait(240) == 0, log.read_text()
    after = rows(out)
    assert after[: len(before)] == before and len(after) > len(before)
    assert {kind for _, kind, _ in after} >= {"build", "race", "quality"}
    chosen = json.loads((out / "tune.json").read_text())["chosen"]
    said = log.stat().st_size
    assert start(model, out, log).wait(240) == 0
    assert rows(out) == after
    again = log.read_text()[said:]
    assert "building" not in again and "racing" not in again and "evaluating" not in again
    assert json.loads((out / "tune.json").read_text())["chosen"] == chosen

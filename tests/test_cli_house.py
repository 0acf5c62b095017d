"""init, cache and completion."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from deploytool.cli.main import run


def _entry(lowered: Path, name: str, age_seconds: float) -> Path:
    folder = lowered / name
    folder.mkdir(parents=True)
    (folder / "prepared.json").write_text(json.dumps({"name": "mine"}))
    (folder / "weights").write_bytes(b"x" * 1000)
    then = time.time() - age_seconds
    os.utime(folder, (then, then))
    return folder


@pytest.fixture
def lowered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lowered"


def test_cache_lists_and_clears_what_is_not_in_use(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Entries must be counted and removed, but never one of the last hour or one that is just being made."""
    old, fresh, made = (_entry(lowered, *about) for about in (("a", 9 * 86_400), ("b", 60), (".tmp-c", 9 * 86_400)))
    assert run(["cache", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(e["name"], e["model"]) for e in told["entries"]] == [("a", "mine"), ("b", "mine")]
    assert told["size_bytes"] == sum(e["size_bytes"] for e in told["entries"]) > 2000
    assert run(["cache", "clear", "--older-than", "10", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == [] and old.is_dir()
    assert run(["cache", "clear", "--dry-run"]) == 0 and old.is_dir()
    assert run(["cache", "clear"]) == 0
    assert not old.exists() and fresh.is_dir() and made.is_dir()
    assert sorted(p.name for p in lowered.iterdir()) == [".tmp-c", "b"]


def test_what_tensorrt_keeps_is_listed_and_cleared(lowered: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of TensorRT's, which no prepared model holds, must be counted and removed like entries."""
    file = lowered.parent / "tensorrt" / "timings-tensorrt-10.9.cache"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1234")
    os.utime(file, (0, 0))
    assert run(["cache", "list", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(e["name"], e["size_bytes"]) for e in told["entries"]] == [("tensorrt/timings-tensorrt-10.9.cache", 4)]
    assert run(["cache", "clear"]) == 0 and not file.exists()


def test_init_writes_a_model_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The written file must open as it is, with every hook, and never replace a file unasked."""
    pytest.importorskip("torch")
    from deploytool.compress.run import predict
    from deploytool.load.model import open_source
    from deploytool.source import ModelRef

    monkeypatch.chdir(tmp_path)
    assert run(["init"]) == 0
    source = open_source(ModelRef("python", "my_model", str(tmp_path / "my_model.py")))
    assert source.evaluate is not None and source.train_batches is not None and source.loss is not None
    assert 0 < source.evaluate(lambda feeds: predict(source, feeds))["accuracy"] < 1, "a gate on it can fail"
    (tmp_path / "my_model.py").write_text("mine")
    assert run(["init"]) == 2 and (tmp_path / "my_model.py").read_text() == "mine"
    assert run(["init", "model.txt"]) == 2 and not (tmp_path / "model.txt").exists()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The script of each shell must name the variable that click answers to; bash must take its script."""
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "_DEPLOYTOOL_COMPLETE" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)

"""Outputs appear whole or not at all, and take the place of nothing but earlier outputs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from deploytool import storage
from deploytool.errors import UsageProblem
from deploytool.storage import new_folder, refuse_existing, settle, work_folder

MARKER = "ours.json"


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An earlier output."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text("old")
    return tmp_path / "out"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    """A finished folder that is to take its place."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / MARKER).write_text("new")
    return tmp_path / "new"


@pytest.fixture(params=["exchanged", "by turns"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """With the system's exchange of two names, and as on a system without."""
    if request.param == "by turns":
        monkeypatch.setattr(storage, "_exchanged", lambda one, other: False)
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_the_new_takes_the_place_of_the_old(old: Path, new: Path) -> None:
    """After settling only the new content is there, and nothing else is left beside it."""
    settle(new, old)
    assert (old / MARKER).read_text() == "new"
    assert [p.name for p in old.parent.iterdir()] == ["out"]


@pytest.mark.usefixtures("way")
def test_a_link_is_replaced_and_its_end_stays(old: Path, new: Path, tmp_path: Path) -> None:
    """Where the place is a symbolic link, the link goes and the folder that it leads to is untouched."""
    (tmp_path / "link").symlink_to(old)
    settle(new, tmp_path / "link")
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link" / MARKER).read_text() == "new"
    assert (old / MARKER).read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "out"]


def test_a_failure_between_two_renames_brings_the_old_back(
    old: Path, new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the second rename fails, the old content is at its place again and the error is told."""
    monkeypatch.setattr(storage, "_exchanged", lambda one, other: False)
    rename = os.replace

    def fail(source: Any, target: Any) -> None:
        if Path(source) == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="Input/output"):
        settle(new, old)
    assert (old / MARKER).read_text() == "old"
    assert sorted(p.name for p in old.parent.iterdir()) == ["new", "out"]


def test_files_can_be_read_by_everybody(new: Path, tmp_path: Path) -> None:
    """A file that a library wrote for its user alone must be readable once finished, and else stay as it is."""
    (new / MARKER).chmod(0o600)
    (new / "run.py").write_text("")
    (new / "run.py").chmod(0o755)
    settle(new, tmp_path / "elsewhere")
    modes = [(tmp_path / "elsewhere" / name).stat().st_mode & 0o777 for name in (MARKER, "run.py")]
    assert modes == [0o644, 0o755]


def test_a_failed_exchange_leaves_the_old(old: Path, tmp_path: Path) -> None:
    """An exchange that the system refuses is an error, not a silent success, and the old content stays."""
    with pytest.raises(FileNotFoundError):
        storage._exchanged(tmp_path / "nowhere", old)
    assert (old / MARKER).read_text() == "old"


def test_nothing_foreign_is_overwritten(old: Path, tmp_path: Path) -> None:
    """An earlier output is replaced when asked for; a folder without its marker, or a file, stays even then."""
    with pytest.raises(UsageProblem, match="must not exist"), new_folder(old, marker=MARKER):
        pass
    (tmp_path / "mine").mkdir()
    with new_folder(tmp_path / "mine", marker=MARKER) as folder:  # an empty folder is nobody's
        (folder / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for foreign in (tmp_path / "mine", tmp_path / "file"):
        with pytest.raises(UsageProblem, match="earlier output") as caught, \
                new_folder(foreign, overwrite=True, marker=MARKER):  # fmt: skip
            pass
        assert caught.value.code == "DT203"
    assert (tmp_path / "mine" / "notes.txt").read_text() == (tmp_path / "file").read_text() == "mine"
    with new_folder(old, overwrite=True, marker=MARKER) as folder:
        (folder / MARKER).write_text("newer")
    assert (old / MARKER).read_text() == "newer"
    refuse_existing(tmp_path / "mine", overwrite=True)


def test_what_a_killed_call_left_stands_in_nobodys_way(tmp_path: Path) -> None:
    """A work folder is in use while its process lives; after a kill the place is free, and the next call cleans it."""
    out = tmp_path / "out"
    out.mkdir()
    code = ("import sys, pathlib; from deploytool.storage import work_folder\n"
            "with work_folder(pathlib.Path(sys.argv[1])) as work: (work / 'half').write_text('x'); "
            "print(1, flush=True); sys.stdin.read()")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", code, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        with pytest.raises(UsageProblem, match="must not exist"):
            refuse_existing(out, overwrite=False)
        with work_folder(out):
            assert len(list(out.iterdir())) == 2
        process.send_signal(signal.SIGKILL)
    (left,) = out.iterdir()
    assert (left / "half").is_file()
    refuse_existing(out, overwrite=False)
    with work_folder(out) as work:
        assert list(out.iterdir()) == [work]
    assert not any(out.iterdir())
    (out / ".work-notes").mkdir()
    (out / ".work-notes" / "mine").write_text("mine")
    with pytest.raises(UsageProblem, match="must not exist"):
        refuse_existing(out, overwrite=False)
    with work_folder(out):
        pass
    assert [path.name for path in out.rglob("*")] == [".work-notes", "mine"]


def test_a_disk_that_fails_early_is_told_at_once(new: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux tells a failed write to the first fsync alone: the one that comes later would succeed."""
    failing = iter([OSError(errno.EIO, "Input/output error")])

    def fsync(handle: int) -> None:
        for error in failing:
            raise error

    monkeypatch.setattr(storage.os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output error"), storage.syncing(new):
        pass


def test_what_comes_and_goes_during_a_sync_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the thread a manifest is written by way of a temporary file: that one must not be looked for."""
    (tmp_path / "below").mkdir()
    (tmp_path / "engine").write_bytes(b"-")
    written, opened = threading.Event(), os.open

    def slow(path: str | Path, flags: int) -> int:
        written.wait(10)
        if Path(path).name == "temporary":
            os.unlink(path)
        return opened(path, flags)

    monkeypatch.setattr(storage.os, "open", slow)
    with storage.syncing(tmp_path):
        (tmp_path / "below" / "temporary").write_bytes(b"-")
        written.set()
    assert (tmp_path / "below" / "temporary").exists()

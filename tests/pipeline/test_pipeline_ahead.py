"""A process that waits: handed on while it is well, and never after it failed."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

import pytest

from deploytool.errors import BackendFailed
from deploytool.pipeline.ahead import Ahead
from deploytool.worker import NO_LIMITS, Worker


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Logs go to a folder of the test."""
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path))


def test_one_process_is_handed_on() -> None:
    """Whoever borrows and then takes must get the process that was started; the next one a new process."""
    with Ahead(NO_LIMITS) as ahead:
        ahead.start()
        ahead.start()
        with ahead.lend("checking") as engine:
            first = engine.call("os:getpid")
        with ahead.take("building") as engine:
            assert engine.call("os:getpid") == first and engine.name == "building"
        with ahead.take("another") as engine:
            assert engine.call("os:getpid") != first


def test_it_may_wait_with_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is asked for, the process imports what the check needs before its first call."""
    expected: list[str] = []
    monkeypatch.setattr(Worker, "expect", lambda self, module: expected.append(module))
    with Ahead(NO_LIMITS) as ahead:
        ahead.start()
        known = list(expected)
        ahead.start(engine=True)
    added = expected[len(known) :]
    assert len(added) == 1 and hasattr(importlib.import_module(added[0]), "write_plain")


def test_a_process_that_failed_is_not_handed_on() -> None:
    """After an error the next one must get a new process."""
    with Ahead(NO_LIMITS) as ahead:
        ahead.start()
        first = ahead._waiting
        with pytest.raises(BackendFailed), ahead.lend("checking") as engine:
            engine.call("os:_exit", status=3)
        with ahead.take("building") as engine:
            assert engine is not first and engine.call("os:getpid") == engine.pid


def test_what_cannot_be_imported_shows_when_it_is_used() -> None:
    """A module that is not there must not end the process that waits for work."""
    with Ahead(NO_LIMITS) as ahead, ahead.take("odd") as engine:
        engine.expect("deploytool.nowhere")
        assert engine.call("os:getpid") == engine.pid


def test_a_process_that_died_unasked_shows_when_it_is_used() -> None:
    """What is expected of a process that is gone must not fail what did not need it yet."""
    with Ahead(NO_LIMITS) as ahead:
        ahead.start()
        waiting = ahead._waiting
        assert waiting is not None
        os.kill(waiting.pid, signal.SIGKILL)
        waiting._process.wait()
        ahead.start(engine=True)
        with pytest.raises(BackendFailed), ahead.take("checking") as engine:
            engine.call("os:getpid")


def test_it_ends_with_the_block(tmp_path: Path) -> None:
    """Nothing may be left of a process that nobody took."""
    with Ahead(NO_LIMITS) as ahead:
        ahead.start()
        waiting = ahead._waiting
    assert waiting is not None and waiting._process.poll() is not None and not list((tmp_path / "logs").iterdir())


def test_the_lowering_is_expected_once(tmp_path: Path) -> None:
    """A model that was typed before is in the cache, and starts no process again; one that failed does."""
    for wanted in (True, False):
        with Ahead(NO_LIMITS) as ahead:
            ahead.expect_lowering("model", "auto", "0")
            assert (ahead._lowering is not None) is wanted and (ahead._waiting is None) is wanted
            assert ahead.run("lowering", "os:getcwd", NO_LIMITS) == os.getcwd() and ahead._lowering is None
    failed = Ahead(NO_LIMITS)
    failed.expect_lowering("another", "auto", "0")
    expected = failed._lowering
    failed.__exit__(ValueError, ValueError("another"), None)
    assert expected is not None and expected._process.poll() is not None
    with Ahead(NO_LIMITS) as ahead:
        ahead.expect_lowering("another", "auto", "0")
        assert ahead._lowering is not None

"""Worker processes against children that crash, hang, flood and lie."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from deploytool import worker
from deploytool.child import uncollected
from deploytool.errors import BackendFailed, InputRefused, InternalError
from deploytool.worker import Limits, Worker

HERE = Path(__file__).parent
CAP = 8_000_000

T = TypeVar("T")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Children find the misbehaving functions; logs go to a folder of the test."""
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def pid_file(tmp_path: Path) -> Path:
    return tmp_path / "pid"


def logs() -> list[Path]:
    return list((worker.cache_folder() / "logs").iterdir())


def wait_for(path: Path) -> int:
    """The process id that a child wrote."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        if path.exists() and (text := path.read_text()):
            return int(text)
        time.sleep(0.01)
    raise AssertionError(f"{path} was not written")


def ended(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends, or is no more than a zombie, within some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


MINUTE = Limits(seconds=60)


def failure(function: str, limits: Limits = MINUTE, **arguments: object) -> BackendFailed:
    """The error that a call ends with; the child must be gone, and the log there."""
    with Worker("test", limits) as child, pytest.raises(BackendFailed) as caught:
        child.call(f"misbehaving:{function}", **arguments)
    assert ended(child.pid, seconds=0.5)
    assert [str(log) in str(caught.value) for log in logs()] == [True]
    return caught.value


def test_result() -> None:
    """The result of a function comes back, and no log is left."""
    assert worker.run("test", "misbehaving:add", a=1, b=2.5) == 3.5
    assert logs() == []


def test_held_object() -> None:
    """An object that `create` made keeps its state between calls."""
    with Worker("test") as child:
        child.create("misbehaving:Counter", start=5)
        assert [child.invoke("increase", by=2), child.invoke("increase", by=3)] == [7, 10]


def test_error_passes_through() -> None:
    """A DeployError of the child is the same error in the parent; the child still answers, and the log is kept."""
    with Worker("test") as child:
        with pytest.raises(InputRefused) as caught:
            child.call("misbehaving:refuse")
        assert caught.value.to_json() == InputRefused(
            "DT301", "the model must exist (got none)", detail=["looked here"], fix="make one"
        ).to_json()  # fmt: skip
        assert child.call("misbehaving:add", a=1, b=1) == 2
    assert len(logs()) == 1


@pytest.mark.parametrize(
    ("function", "said"),
    [("raise_value_error", "ValueError: seven is no colour"), ("return_object", "not JSON serializable")],
)  # fmt: skip
def test_foreign_exception(function: str, said: str) -> None:
    """Any other exception, or an answer that is no JSON, is DT504 and names what was raised."""
    error = failure(function)
    assert error.code == "DT504" and said in error.message
    assert "Traceback" in logs()[0].read_text()


def test_our_own_bug_is_told_as_one() -> None:
    """What deploytool's own code raises is DT900, not the backend's fault: here, an unknown function was asked for."""
    with pytest.raises(InternalError, match="no_such_function"):
        worker.run("test", "misbehaving:no_such_function")
    assert "Traceback" in logs()[0].read_text()


def test_progress() -> None:
    """Progress arrives in order, before the result."""
    said: list[str] = []
    assert worker.run("test", "misbehaving:count", say=said.append, steps=1000) == 1000
    assert said == [f"step {n}" for n in range(1000)]


def test_progress_does_not_extend_the_time() -> None:
    """A child that reports progress all the time is stopped all the same."""
    assert failure("drip", Limits(seconds=1), seconds=3600).code == "DT502"


def test_segfault() -> None:
    """A crash in native code is DT501, names the signal and the Python line where it happened."""
    error = failure("segfault")
    assert error.code == "DT501" and "SIGSEGV" in error.message
    assert any("in segfault" in line for line in error.detail)


@pytest.mark.parametrize(
    ("function", "arguments", "status"),
    [("leave", {"status": 0}, 0), ("leave", {"status": 3}, 3), ("leave_politely", {}, 0)],
)
def test_exit_without_an_answer(function: str, arguments: dict[str, int], status: int) -> None:
    """A child that leaves without an answer failed, also with status 0."""
    error = failure(function, **arguments)
    assert error.code == "DT501" and f"exit status {status} without an answer" in error.message


def test_killed_child() -> None:
    """A child that the kernel killed is DT501, and the message says why that may be."""
    error = failure("kill_self")
    assert error.code == "DT501" and "SIGKILL" in error.message and "memory" in error.message


def test_use_after_death() -> None:
    """A call to a child that is gone is DT501 again, not a hang or a BrokenPipeError."""
    with Worker("test", Limits(seconds=60)) as child:
        for _ in range(2):
            with pytest.raises(BackendFailed) as caught:
                child.call("misbehaving:leave", status=1)
            assert caught.value.code == "DT501"


def test_hang_that_ignores_sigterm(pid_file: Path) -> None:
    """A child that hangs and ignores SIGTERM is killed, soon after its time is over."""
    start = time.monotonic()
    error = failure("hang", Limits(seconds=2), pid_file=str(pid_file))
    assert error.code == "DT502" and "within 2 s" in error.message
    assert time.monotonic() - start < 30


def test_memory_hog() -> None:
    """A child that outgrows its memory is stopped before it has taken all that it wants."""
    error = failure("hog", Limits(seconds=120, memory_bytes=300_000_000), megabytes=3000)
    assert error.code == "DT503" and "under 300 MB" in error.message


def test_memory_error() -> None:
    """A MemoryError of the child is told as what it is."""
    assert failure("memory_error").code == "DT503"


def test_peak_memory_is_recorded() -> None:
    """The largest size seen is kept, and is more than an empty interpreter's."""
    with Worker("test", Limits(seconds=1)) as child:
        with pytest.raises(BackendFailed):
            child.call("misbehaving:hog", megabytes=50)
        assert child.peak_bytes > 40_000_000


def test_flood_of_output() -> None:
    """200 MB of output never make a log that is much larger than its limit, and the last words are kept."""
    with Worker("test", Limits(seconds=120)) as child:
        with looking(lambda: child.log.stat().st_size) as sizes:
            assert child.call("misbehaving:shout", megabytes=200) == 200
        child.call("misbehaving:echo", value=1)
        text = child.log.read_text()
        assert len(text) <= CAP and text.endswith("the last words\n")
    assert max(sizes) < 100_000_000
    assert logs() == []


def test_log_is_cut_in_order() -> None:
    """What a child says while its log is cut stands behind what it said before."""
    with Worker("test", Limits(seconds=120)) as child:
        with child.log.open("rb") as log, looking(lambda: os.pread(log.fileno(), 8, 0).split(b" ")[0]) as starts:
            child.call("misbehaving:say_numbers", lines=300_000)
        numbers = [int(line) for line in child.log.read_text().splitlines()[2:]]
    assert set(starts) <= {b"", b"0", b"[earlier"} and b"[earlier" in starts
    assert numbers == sorted(numbers) and numbers[-1] == 299_999


def test_a_flood_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that writes faster than its log is read keeps nobody from going on."""
    with Worker("test", Limits(seconds=120)) as child:
        child.log.write_bytes(b"x" * (CAP + 1))
        monkeypatch.setattr(os, "pread", lambda file, size, start: b"y" * size)
        child.call("misbehaving:echo", value=1)
        assert CAP < child.log.stat().st_size < 2 * CAP


@contextlib.contextmanager
def looking(look: Callable[[], T]) -> Iterator[list[T]]:
    """What a thread sees that looks all the while."""
    seen: list[T] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            seen.append(look())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        stop.set()
        thread.join()


def test_kept_log_is_cut() -> None:
    """The log that a failure leaves is no larger than its limit."""
    with pytest.raises(BackendFailed), Worker("test") as child:
        child.call("misbehaving:say_and_raise", text="y" * 20_000_000)
    assert 0 < logs()[0].stat().st_size <= CAP


@pytest.mark.parametrize("text", ["nonsense\n", "{\"result\": \n", "[1]\n", "{}\n", "\xff\n", "[" * 100_000 + "\n"])
def test_corrupt_answer(text: str) -> None:
    """What is not one of the answers that a worker gives is DT501, never an exception of the parser."""
    error = failure("answer_with", text=text)
    assert error.code == "DT501" and "JSON" in error.message


def test_answer_cut_short() -> None:
    """Half an answer and silence end with the time limit."""
    assert failure("answer_with", Limits(seconds=2), text='{"result": 1').code == "DT502"


@pytest.mark.parametrize("size", [65_536, 1_000_000, 30_000_000])
def test_large_payload(size: int) -> None:
    """Requests and answers larger than the pipe's buffer arrive whole."""
    value = {"text": "z" * size, "unicode": "é\n\u2028"}
    with Worker("test", Limits(seconds=60)) as child:
        assert child.call("misbehaving:echo", value=value) == value
        assert child.call("misbehaving:add", a=1, b=1) == 2


def test_child_that_does_not_read(pid_file: Path) -> None:
    """A stopped child, which reads no request, runs into the time limit instead of hanging the parent."""
    with Worker("test", Limits(seconds=2)) as child:
        assert child.call("misbehaving:add", a=1, b=1) == 2
        os.kill(child.pid, signal.SIGSTOP)
        with pytest.raises(BackendFailed) as caught:
            child.call("misbehaving:echo", value="z" * 1_000_000)
        assert caught.value.code == "DT502"
        assert ended(child.pid)


@pytest.mark.parametrize("new_session", [False, True])
def test_grandchildren_end(pid_file: Path, new_session: bool) -> None:
    """What a child started ends with it: after an answer and after a time limit, in its session or another."""
    with Worker("test") as child:
        grandchild = child.call("misbehaving:spawn", pid_file=str(pid_file), new_session=new_session)
        assert psutil.pid_exists(grandchild)
    assert ended(grandchild)
    failure("spawn_and_hang", Limits(seconds=2), pid_file=str(pid_file), new_session=new_session)
    assert ended(wait_for(pid_file))


def test_death_beside_a_fork() -> None:
    """A child's death is noticed although a fork of it holds the pipe open."""
    assert "exit status 3" in failure("fork_and_die").message


PARENT = """
import sys
from deploytool.worker import Worker
with Worker("test") as child:
    child.call("misbehaving:hang", pid_file=sys.argv[1])
"""


@pytest.fixture
def parent(pid_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", PARENT, str(pid_file)], stderr=subprocess.DEVNULL)
    yield process
    process.kill()
    process.wait()


def test_parent_killed(parent: subprocess.Popen[bytes], pid_file: Path) -> None:
    """A child ends when its parent is killed outright."""
    child = wait_for(pid_file)
    parent.kill()
    parent.wait()
    assert ended(child)


def test_interrupt(parent: subprocess.Popen[bytes], pid_file: Path) -> None:
    """Ctrl-C ends the child at once, even one that ignores SIGTERM, and leaves no log."""
    child = wait_for(pid_file)
    parent.send_signal(signal.SIGINT)
    parent.wait(10)
    assert ended(child, seconds=0.5)
    assert logs() == []


def test_working_folder_is_not_imported_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the working folder cannot stand in for a library."""
    (tmp_path / "queue.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert not worker.run("test", "misbehaving:module_origin", name="queue").startswith(str(tmp_path))


def test_environment() -> None:
    """The environment given to a worker reaches its child, beside what every child gets."""
    with Worker("test", environment={"OMP_NUM_THREADS": "1"}) as child:
        assert child.call("misbehaving:environment", name="OMP_NUM_THREADS") == "1"
        assert child.call("misbehaving:environment", name="TOKENIZERS_PARALLELISM") == "false"


def test_what_a_child_imports_is_not_searched_for_garbage() -> None:
    """What was imported is left out of later searches, which are off meanwhile and go on afterwards."""
    with Worker("test") as child:
        found = child.call("misbehaving:collection", module="decimal")
        again = child.call("misbehaving:collection", module="decimal")
    assert 0 < found["before"] < found["after"], "the imports of the child itself count as well"
    assert found["searching"] == 2 == again["searching"], "on before and after the block, off inside"


def test_garbage_of_the_caller_is_still_found() -> None:
    """In the process that calls deploytool nothing is left out, and a search that was off stays off."""
    frozen = gc.get_freeze_count()
    gc.disable()
    try:
        with uncollected():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
    with uncollected():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() == frozen


def test_odd_name() -> None:
    """A worker may be named after anything: its log stays one file in the log folder."""
    with Worker("../../bench models/x:y " + "n" * 300) as child:
        assert child.log.parent == worker.cache_folder() / "logs" and child.log.is_file()


def test_close_twice() -> None:
    """Closing again does nothing: the pipe's numbers may belong to others by then."""
    child = Worker("test")
    child.close()
    reused = os.pipe()
    child.close()
    for handle in reused:
        os.close(handle)

"""The record of a search: work is done once, in whatever run."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused
from deploytool.tune.store import Store


def test_work_is_done_once(tmp_path: Path) -> None:
    """The same kind and inputs give the recorded result, in a later run too; other inputs are other work."""
    done: list[int] = []

    def work(value: int) -> dict[str, int]:
        done.append(value)
        return {"value": value}

    for _ in range(2):
        with Store(tmp_path) as store:
            assert store.once("race", {"a": 1, "b": [2]}, lambda: work(1)) == {"value": 1}
            assert store.once("race", {"b": [2], "a": 1}, lambda: work(9)) == {"value": 1}
            assert store.once("build", {"a": 1, "b": [2]}, lambda: work(2)) == {"value": 2}
            assert store.seconds() > 0
    assert done == [1, 2]


def test_interrupted_work_leaves_nothing(tmp_path: Path) -> None:
    """Work that was interrupted, or whose error may not come again, is done again; a refusal is remembered."""
    for error, again in ((KeyboardInterrupt(), True), (BackendFailed("DT501", "it must answer"), True),
                         (EnvironmentLacking("DT403", "full"), True), (InputRefused("DT310", "no"), False),
                         (BackendFailed("DT504", "it must build"), False)):  # fmt: skip
        with Store(tmp_path) as store:
            tried: list[bool] = []

            def work(error: BaseException = error, tried: list[bool] = tried) -> None:
                tried.append(True)
                raise error

            for _ in range(2):
                with pytest.raises(type(error)):
                    store.once("build", {"about": repr(error)}, work)
            assert len(tried) == (2 if again else 1)


def test_one_search_at_a_time(tmp_path: Path) -> None:
    """A second search in the same folder is refused, not mixed with the first."""
    with Store(tmp_path), pytest.raises(EnvironmentLacking, match="one search at a time"):
        Store(tmp_path).__enter__()


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    """What is no record of a search is refused, and the folder is free again."""
    (tmp_path / "tune.sqlite").write_bytes(b"not a database at all" * 100)
    for _ in range(2):
        with pytest.raises(InputRefused, match="record of a search"):
            Store(tmp_path).__enter__()

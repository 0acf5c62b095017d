"""What a search has done, in an SQLite file: the same work on the same inputs is done once, in whatever run."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from filelock import FileLock, Timeout

from deploytool.errors import DeployError, EnvironmentLacking, InputRefused, from_json

_SCHEMA = """
CREATE TABLE IF NOT EXISTS done (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, about TEXT NOT NULL, result TEXT NOT NULL, seconds REAL NOT NULL
)
"""
_KEPT_CODES = {"DT504"}  # what a backend says of a model is the same tomorrow; a crash or a full disk is not
_KEPT_EXITS = {1, 2, 3}


def digest(data: Any) -> str:
    """SHA-256 of data as JSON with sorted keys, hexadecimal."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


class Store:
    """The file `tune.sqlite` of a search's folder; a context manager that holds the folder's lock.

    Every piece of work is a row of its own: what kind, about what, the result, how long it took. The row is written
    when the work is done, in one transaction, so that a search that is killed goes on behind the last finished piece.
    Threads may share a store: what one of them does the others wait for.
    """

    def __init__(self, folder: Path):
        self._path = folder / "tune.sqlite"
        self._lock = FileLock(folder / "tune.lock")
        self._one_at_a_time = threading.Lock()
        self._doing: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def __enter__(self) -> Self:
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise EnvironmentLacking("DT404", f"only one search at a time may write to {self._path.parent}",
                                     fix="wait for the other one, or choose another -o") from error  # fmt: skip
        try:
            self._database = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._lock.release()
            raise InputRefused("DT309", f"{self._path} must be the record of a search (got: {error})",
                               fix="remove it; the search then starts anew") from error  # fmt: skip
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self._lock.release()

    def once(self, kind: str, about: Mapping[str, Any], work: Callable[[], Any]) -> Any:
        """The result of the work on these inputs: the recorded one, else it is done now and recorded.

        An error that follows from the inputs is recorded and raised again; any other is raised and not kept.
        """
        with self._one_at_a_time:
            doing = self._doing[digest([kind, about])]
        with doing:
            known = self.find(kind, about) or self._do(kind, about, work)
        if "error" in known:
            raise from_json(known["error"])
        return known["value"]

    def _do(self, kind: str, about: Mapping[str, Any], work: Callable[[], Any]) -> dict[str, Any]:
        started = time.perf_counter()
        try:
            known = {"value": work()}
        except DeployError as error:
            if error.exit_code not in _KEPT_EXITS and error.code not in _KEPT_CODES:
                raise
            known = {"error": error.to_json()}
        result = json.dumps(known, allow_nan=False)
        row = digest([kind, about]), kind, json.dumps(about), result, time.perf_counter() - started
        self._ask("INSERT INTO done VALUES (?, ?, ?, ?, ?)", *row)
        found: dict[str, Any] = json.loads(result)  # as it will be read again
        return found

    def _ask(self, statement: str, *values: Any) -> Any:
        """The first row that a statement gives."""
        with self._one_at_a_time:
            return self._database.execute(statement, values).fetchone()

    def find(self, kind: str, about: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is recorded of this work: {"value": ...} or {"error": ...}; None where it was not done."""
        row = self._ask("SELECT result FROM done WHERE key = ?", digest([kind, about]))
        found: dict[str, Any] | None = None if row is None else json.loads(row[0])
        return found

    def forget(self, kind: str, about: Mapping[str, Any]) -> None:
        """Drop a result whose files are gone."""
        self._ask("DELETE FROM done WHERE key = ?", digest([kind, about]))

    def seconds(self) -> float:
        """How long all recorded work took."""
        return float(self._ask("SELECT COALESCE(SUM(seconds), 0) FROM done")[0])

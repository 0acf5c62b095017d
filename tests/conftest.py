"""One cache for the whole run, apart from the user's, and `--require`, so that a run cannot go green by absence."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require", default="", metavar="A,B", help="modules without which nothing is run")


def pytest_configure(config: pytest.Config) -> None:
    """`pytest.importorskip` skips only what is not there; what is there and does not import is an error already."""
    names = [name for name in config.getoption("--require").split(",") if name]
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    if absent:
        raise pytest.UsageError(f"--require: not installed: {', '.join(absent)}")
    # A shell starts background jobs with Ctrl-C ignored, which children inherit: those of tests must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes by far the longest comes first: of several processes none waits for it at the end."""
    items.sort(key=lambda item: item.path.name != "test_main_job.py")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Lowered models and logs of this run: shared by its tests, never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DEPLOYTOOL_CACHE", str(folder))
        yield folder

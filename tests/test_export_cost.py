"""What the peak of an export's memory is made of: imports, and what the export adds to them."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench" / "export_cost.py"
WEIGHTS = 20_000_000
# Stands for an export: a process with a child, which both import, of which the child holds what `weights` says.
PARENT = """
import subprocess, sys, numpy, pathlib
kept = pathlib.Path(sys.argv[1]).parent / "cache" / "prepared.json"
kept.parent.mkdir()
kept.write_text('{"weight_bytes": %d}')
subprocess.run([sys.executable, "-c", "import numpy, time; held = numpy.ones(%d, 'u1'); time.sleep(1)"], check=True)
"""


@pytest.fixture(scope="module")
def cost() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_of_exports", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for their module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("times", [1, 3])
def test_imports_are_told_apart(cost: ModuleType, tmp_path: Path, times: int) -> None:
    """Of two processes with NumPy, only what one of them holds beside it must count as added, per byte of weights."""
    script = tmp_path / "parent.py"
    script.write_text(PARENT % (WEIGHTS, times * WEIGHTS))
    out = tmp_path / "out"
    found = cost.memory([sys.executable, str(script), str(out)], out)
    assert len(found["processes"]) == 2 and json.dumps(found)
    assert all(part["imports_bytes"] > 15_000_000 for part in found["processes"])  # Python alone takes 10 MB
    assert found["peak_bytes"] == found["imports_bytes"] + found["added_bytes"]
    assert times - 0.3 < found["added_per_weights"] < times + 0.3

"""A recipe: the TOML file that says which compression steps run, in which order, with which settings.

Checked without importing torch. The step tables are those of every `deploytool/compress/FAMILY/tables.py`.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field

from deploytool import shipped
from deploytool.compress.step import Calibration, StepTable, Training
from deploytool.errors import UsageProblem, nearest
from deploytool.settings import Table, check_table, collect, complain, line_of, read_toml

RECIPES = "models/recipes"
T = TypeVar("T")


class Quality(Table):
    """`max_drop`: how much of any metric may be lost, relative to the uncompressed model's, 0 to 1."""

    max_drop: float | None = Field(default=None, ge=0, le=1)


class _File(Table):
    model: str | None = None
    targets: tuple[str, ...] = Field(default=(), strict=False)
    compress: list[dict[str, Any]] = Field(default_factory=list)
    calibration: Calibration = Calibration()
    quality: Quality = Quality()
    training: Training = Training()


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; `steps` are the settings of the steps in their order."""

    where: str
    steps: tuple[StepTable, ...]
    model: str | None = None
    targets: tuple[str, ...] = ()
    calibration: Calibration = Calibration()
    quality: Quality = Quality()
    training: Training = Training()

    def plan(self) -> list[dict[str, Any]]:
        """What will be done, as data: one table per step with every setting, defaults included."""
        return [step.model_dump(mode="json") for step in self.steps]


@cache
def step_tables() -> dict[str, type[StepTable]]:
    """Every step's table by the step's name."""
    found: dict[str, type[StepTable]] = {}
    for path in sorted(Path(__file__).parent.glob("*/tables.py")):
        module = importlib.import_module(f"deploytool.compress.{path.parent.name}.tables")
        tables = [t for t in vars(module).values() if inspect.isclass(t) and issubclass(t, StepTable)]
        found.update({t.step_name(): t for t in tables if t.__module__ == module.__name__})
    return found


def find_recipe(name: str) -> Path:
    """The file of a shipped recipe's name, or of a path; raises UsageProblem when there is none."""
    path = shipped.find(RECIPES, name, ".toml")
    if path is None:
        raise UsageProblem("DT201", f"the recipe must be a TOML file or a shipped recipe's name "
                           f"(got {shipped.unfound(name)})", detail=[nearest(name, recipe_names())],
                           fix="see docs/compress.md for the steps of a recipe")  # fmt: skip
    return path


def recipe_names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return shipped.names(RECIPES, ".toml")


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe; raises UsageProblem with the errors of all its tables, each as `file:line: ...`."""
    data, text = read_toml(path)
    return parse_recipe(data, text, where=str(path))


def parse_recipe(data: dict[str, Any], text: str, *, where: str) -> Recipe:
    """Check the data that came from a TOML text."""
    problems: list[str] = []
    file = collect(problems, lambda: check_table(data, _File, text=text, where=where))
    tables = data.get("compress", [])
    raw = [t for t in tables if isinstance(t, dict)] if isinstance(tables, list) else []
    steps = [collect(problems, lambda i=i, t=t: _step(t, i, text, where)) for i, t in enumerate(raw)]  # type: ignore[misc]
    if problems or file is None:
        raise complain(where, problems)
    return Recipe(where, tuple(s for s in steps if s is not None), file.model, file.targets, file.calibration,
                  file.quality, file.training)  # fmt: skip


def _step(table: dict[str, Any], index: int, text: str, where: str) -> StepTable:
    tables = step_tables()
    name = table.get("step")
    if name not in tables:
        line = line_of(text, ("compress", index, "step"))
        what = "missing key 'step'" if name is None else f"unknown step {name!r}"
        raise UsageProblem("DT202", "", detail=[f"{where}:{line}: {what}; {nearest(str(name), tables)}"])
    return check_table(table, tables[str(name)], text=text, where=where, prefix=("compress", index))

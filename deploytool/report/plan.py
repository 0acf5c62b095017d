"""A plan as a table: what a command is about to do, for people. `--json` prints the same as data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from deploytool.report.rows import Grid
from deploytool.report.table import grid_table

_WIDTH = 100  # of the values: a long list goes on in the next row


def plan_table(plan: Mapping[str, Any]) -> str:
    """One row per key of a plan; a list of steps has one row for each."""
    rows = [(name if first else "", part) for name, value in _named(plan)
            for first, part in _parts(value)]  # fmt: skip
    return grid_table(Grid(("plan", ""), tuple(rows), frozenset()))


def _named(plan: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in plan.items():
        if key == "model":
            given = f", inputs of {value['samples']}" if value.get("samples") else ""
            yield key, f"{value['name']} ({value['kind']}: {value['path']}{given})"
        elif key == "steps":
            for number, step in enumerate(value, 1):
                settings = {name: setting for name, setting in step.items() if name != "step" and setting is not None}
                yield f"step {number}", f"{step['step']}: {_text(settings)}" if settings else step["step"]
        elif key.endswith("_bytes"):
            yield key.removesuffix("_bytes").replace("_", " "), ", ".join(f"{name} {count / 1e6:.0f} MB"
                                                                          for name, count in value.items())  # fmt: skip
        else:
            yield key.replace("_", " "), _text(value)


def _text(value: Any) -> str:
    """A value in words; nothing is a dash, as in every table."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(inner)}" for name, inner in value.items()) or "-"
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "-"
    return f"{value:g}" if isinstance(value, float) else "-" if value is None else str(value)


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """The text in lines that fit, and whether each is the first; words stay whole."""
    lines = textwrap.wrap(text, _WIDTH, break_long_words=False, break_on_hyphens=False) or [""]
    return ((index == 0, line) for index, line in enumerate(lines))

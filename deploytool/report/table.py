"""Results as aligned plain text for a terminal, in ASCII."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploytool.report.rows import Grid, check_grid, export_grid
from deploytool.results import Verdict


def export_table(report: Mapping[str, Any]) -> str:
    """The report that `export --json` prints, one line per target, then reasons and findings."""
    return grid_table(export_grid(report))


def check_table(verdict: Verdict | Mapping[str, Any]) -> str:
    """A verdict, or its JSON: one line per finding, those that decide first, then the verdict."""
    return grid_table(check_grid(verdict))


def grid_table(grid: Grid) -> str:
    """Header, rule, rows, then the lines below."""
    cells = [[_plain(cell) for cell in row] for row in (grid.header, *grid.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [name in grid.numbers for name in grid.header]
    lines = ["  ".join(cell.rjust(width) if number else cell.ljust(width)
                       for cell, width, number in zip(row, widths, right, strict=True)).rstrip()
             for row in cells]  # fmt: skip
    lines.insert(1, "  ".join("-" * width for width in widths))
    notes = [_plain(line) for line in grid.lines]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _plain(text: str) -> str:
    """One line of printable ASCII: what a report says must not move the cursor of who reads it."""
    return "".join(c if c.isprintable() else " " for c in text).encode("ascii", "backslashreplace").decode()

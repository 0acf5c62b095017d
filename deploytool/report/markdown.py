"""Results as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deploytool.report.rows import Page, check_page, export_page
from deploytool.results import Verdict


def export_markdown(report: Mapping[str, Any]) -> str:
    """The report that `export --json` prints: a heading, where it was measured, a table, reasons and findings."""
    return page_markdown(export_page(report))


def check_markdown(verdict: Verdict | Mapping[str, Any]) -> str:
    """A verdict, or its JSON: a heading, a table of the findings, the verdict."""
    return page_markdown(check_page(verdict))


def page_markdown(page: Page) -> str:
    """A heading, the facts, one table, and the lines below it."""
    grid = page.grid
    rule = ["---:" if name in grid.numbers else "---" for name in grid.header]
    rows = [[_cell(cell) for cell in row] for row in (grid.header, *grid.rows)]
    table = ["| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:])]
    facts = [f"- {_cell(name)}: {_cell(value)}" for name, value in page.facts]
    parts = [[f"# {_cell(page.title)}"], facts, table, [f"- {_cell(line)}" for line in grid.lines]]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


def _cell(value: Any) -> str:
    """Text that stands for itself in Markdown: on one line, no markup, no HTML."""
    text = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))

"""Results as one HTML page that needs nothing beside it: no script, no font, no picture."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, StrictUndefined

from deploytool.report.plot import draw
from deploytool.report.rows import Page

_TEMPLATE = Path(__file__).with_name("page.html")


def page_html(page: Page) -> str:
    """Every value stands for itself: what a report says is text, never markup."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
                              keep_trailing_newline=True)  # fmt: skip
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        page=page, grid=page.grid, drawings=[draw(curve) for curve in page.curves]
    )

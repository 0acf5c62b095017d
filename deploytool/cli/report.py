"""deploytool report"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploytool.cli import options
from deploytool.errors import EnvironmentLacking, InputRefused

if TYPE_CHECKING:
    from deploytool.report.rows import Page


@click.command("report")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--format", "form", type=click.Choice(["table", "markdown", "html", "json"]), default="table",
              show_default=True)  # fmt: skip
def command(path: Path, form: str) -> None:
    """Render PATH as a table, Markdown, HTML or JSON.

    PATH is an export's output folder, one artifact, a folder that compress wrote, or a document of `export`,
    `compress`, `verify` or `check` with --json. HTML draws the losses of steps that trained.
    """
    from deploytool.artifact import REPORT
    from deploytool.load.resolve import COMPRESSED
    from deploytool.report.document import read_document
    from deploytool.report.markdown import page_markdown
    from deploytool.report.table import grid_table

    file = path
    if path.is_dir():
        file = path / (COMPRESSED if (path / COMPRESSED).is_file() else REPORT)
    if not file.is_file():
        raise InputRefused("DT309", f"{path} must hold {REPORT} or {COMPRESSED} (it does not)",
                           fix="name what `export` or `compress` wrote")  # fmt: skip
    document = read_document(file)
    page = document.page
    if form == "json":
        options.print_json(document.data)
    elif form == "html":
        click.echo(_html(page), nl=False)
    else:
        click.echo(grid_table(page.grid) if form == "table" else page_markdown(page))


def _html(page: Page) -> str:
    try:
        from deploytool.report.html import page_html
    except ImportError as error:
        raise EnvironmentLacking("DT401", f"the package jinja2 must be there for HTML (got: {error})",
                                 fix="pip install 'deploytool[report]'") from error  # fmt: skip
    return page_html(page)

"""deploytool report"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from deploytool.cli import options
from deploytool.errors import EnvironmentLacking, InputRefused, UsageProblem

if TYPE_CHECKING:
    from deploytool.report.document import Document
    from deploytool.report.rows import Page


@click.command("report")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--format", "form", type=click.Choice(["table", "markdown", "html", "json"]), default="table",
              show_default=True)  # fmt: skip
@click.option("-o", "--output", default=None, type=click.Path(path_type=Path),
              help="A file to write to. Default: print it.")  # fmt: skip
@options.overwrite_option
def command(path: Path, form: str, output: Path | None, overwrite: bool) -> None:
    """Render PATH as a table, Markdown, HTML or JSON.

    PATH is an export's output folder, one artifact, a folder that compress wrote, or a document of `export`,
    `compress`, `verify` or `check` with --json. HTML draws the losses of steps that trained.
    """
    from deploytool.artifact import REPORT
    from deploytool.load.resolve import COMPRESSED
    from deploytool.report.document import read_document
    from deploytool.storage import refuse_existing, write_bytes

    if output is not None:
        refuse_existing(output, overwrite)
        if output.is_dir():
            raise UsageProblem("DT203", f"the output must be a file (got the folder {output})", fix="name a file in it")

    file = path
    if path.is_dir():
        file = path / (COMPRESSED if (path / COMPRESSED).is_file() else REPORT)
    if not file.is_file():
        raise InputRefused("DT309", f"{path} must hold {REPORT} or {COMPRESSED} (it does not)",
                           fix="name what `export` or `compress` wrote")  # fmt: skip
    text = _rendered(read_document(file), form)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_bytes(output, text.encode())


def _rendered(document: Document, form: str) -> str:
    """The whole text, with a newline at its end."""
    from deploytool.report.markdown import page_markdown
    from deploytool.report.table import grid_table

    if form == "html":
        return _html(document.page)
    if form == "json":
        return json.dumps(document.data, indent=2, allow_nan=False) + "\n"
    return (grid_table(document.page.grid) if form == "table" else page_markdown(document.page)) + "\n"


def _html(page: Page) -> str:
    try:
        from deploytool.report.html import page_html
    except ImportError as error:
        raise EnvironmentLacking("DT401", f"the package jinja2 must be there for HTML (got: {error})",
                                 fix="pip install 'deploytool[report]'") from error  # fmt: skip
    return page_html(page)

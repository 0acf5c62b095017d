"""deploytool report"""

from __future__ import annotations

import json
from pathlib import Path

import click

from deploytool.errors import InputRefused
from deploytool.storage import read_json


@click.command("report")
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--format", "form", type=click.Choice(["table", "markdown", "json"]), default="table", show_default=True)
def command(path: Path, form: str) -> None:
    """Render PATH (an export's output folder, one artifact, or a report.json) as a table, Markdown or JSON."""
    from deploytool.artifact import REPORT
    from deploytool.report.markdown import export_markdown
    from deploytool.report.table import export_table

    file = path / REPORT if path.is_dir() else path
    if not file.is_file():
        raise InputRefused("DT309", f"{path} must hold {REPORT} (it does not)", fix="name what `export` wrote")
    try:
        data = read_json(file)
        report = data if "targets" in data else {**data, "targets": [data]}
    except (ValueError, TypeError) as error:
        raise InputRefused("DT309", f"{file} must be a report in JSON (got: {error})") from error
    if form == "json":
        click.echo(json.dumps(report, indent=2))
    else:
        click.echo(export_table(report) if form == "table" else export_markdown(report))

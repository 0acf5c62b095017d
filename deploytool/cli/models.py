"""deploytool models"""

from __future__ import annotations

import ast

import click

from deploytool import shipped
from deploytool.cli import options


@click.command("models")
@options.json_option
def command(as_json: bool) -> None:
    """List the shipped models."""
    rows = []
    for name in shipped.names("models", ".py"):
        path = shipped.shipped("models") / f"{name}.py"
        about = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]
        rows.append({"name": name, "about": about})
    if as_json:
        options.print_json({"schema_version": "1.0", "models": rows})
        return
    width = max(len(row["name"]) for row in rows)
    for row in rows:
        click.echo(f"{row['name']:<{width}}  {row['about']}")

"""deploytool targets list | show | probe"""

from __future__ import annotations

import json
from typing import Any

import click

from deploytool.cli import options


@click.group("targets")
def command() -> None:
    """List, show or probe the targets."""


@command.command("list")
@options.json_option
def list_(as_json: bool) -> None:
    """Every shipped target and whether it can be built and run here."""
    from deploytool.target import target_names

    _print([_row(name) for name in target_names()], as_json)


@command.command("probe")
@click.argument("names", nargs=-1)
@options.json_option
def probe(names: tuple[str, ...], as_json: bool) -> int:
    """Whether targets can be built and run here; exit code 4 when one that was named cannot be built."""
    from deploytool.target import target_names

    rows = [_row(name) for name in names or target_names()]
    _print(rows, as_json)
    return 4 if names and not all(row["available"] for row in rows) else 0


@command.command("show")
@click.argument("name")
@options.json_option
def show(name: str, as_json: bool) -> None:
    """The whole profile of a target."""
    from deploytool.backends.base import load_checked_target

    profile = load_checked_target(name).to_json()
    if as_json:
        options.print_json({"schema_version": "1.0", "target": profile})
        return
    for key, value in profile.items():
        for name, entry in value.items() if isinstance(value, dict) else [("", value)]:
            said = entry if isinstance(entry, str) else json.dumps(entry)
            click.echo(f"{key}.{name}: {said}" if name else f"{key}: {said}")


def _row(name: str) -> dict[str, Any]:
    from deploytool.backends.base import find_backend, load_checked_target

    target = load_checked_target(name)
    found = find_backend(target.backend).probe(target)
    return {
        "name": target.name,
        "precision": target.precision,
        "backend": target.backend,
        "available": found.available,
        "executes": found.available and found.executes,
        "reason": found.reason,
        "fix": found.fix,
        "description": target.description,
    }


def _print(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        options.print_json({"schema_version": "1.0", "targets": rows})
        return
    width = max(len(row["name"]) for row in rows) + 2
    for row in rows:
        state = "runs here" if row["executes"] else "builds here" if row["available"] else "unavailable"
        click.echo(f"{row['name']:<{width}}{row['precision']:<6}{state:<13}{row['description']}")
        if row["reason"]:
            click.echo(f"{'':<{width + 6}}{row['reason']}; {row['fix']}")

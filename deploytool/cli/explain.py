"""deploytool explain"""

from __future__ import annotations

import click

from deploytool.errors import CODES, UsageProblem, nearest


@click.command("explain")
@click.argument("code")
def command(code: str) -> None:
    """Say what an error code such as DT305 means."""
    name = code.upper()
    if name not in CODES:
        raise UsageProblem("DT201", f"the code must be a known one (got {code!r})", detail=[nearest(name, CODES)],
                           fix="the code stands in brackets behind the word error, as in error[DT305]")  # fmt: skip
    click.echo(f"{name}: {CODES[name]}")

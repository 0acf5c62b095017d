"""deploytool completion"""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

from deploytool.errors import InternalError

_SHELLS = ("bash", "zsh", "fish")


@click.command("completion")
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def command(ctx: click.Context, shell: str) -> None:
    """Print the shell's completion script, to be evaluated at its start: eval "$(deploytool completion bash)"."""
    kind = get_completion_class(shell)
    if kind is None:
        raise InternalError("DT900", f"click must know the shell {shell}")
    click.echo(kind(ctx.find_root().command, {}, "deploytool", "_DEPLOYTOOL_COMPLETE").source())

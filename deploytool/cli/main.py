"""The command `deploytool`: a lazy group, and the one place where errors become exit codes.

Exit codes: 0 done, 1 a check said no, 2 usage, 3 input refused, 4 environment, 5 backend failed, 6 integrity,
7 inconclusive, 70 our bug, 130 and 143 interrupted.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from deploytool import __version__
from deploytool.errors import CODES, DeployError, EnvironmentLacking, InternalError, UsageProblem, nearest

# One file per command, imported when it is used: `--help` must not wait for anything.
COMMANDS = {
    "export": "Lower, build, verify and time a model for one or more targets",
    "compress": "Run a recipe's compression steps; the result is a model again",
    "tune": "Search for the best artifact within a quality budget",
    "verify": "Compare artifacts with their reference again",
    "bench": "Time artifacts against each other, interleaved",
    "package": "Put verified artifacts into one bundle",
    "bundle": "Verify, self-test or unpack a bundle",
    "check": "Gate a candidate against what was released",
    "inspect": "Show what a model, artifact or bundle holds",
    "report": "Render results as a table, Markdown or HTML",
    "targets": "List, show or probe the targets",
    "models": "List the shipped models",
    "init": "Write a model file to start from",
    "cache": "Show or empty the cache of lowered models",
    "doctor": "Say what is missing here and how to fix it",
    "explain": "Explain an error code",
    "completion": "Print a shell's completion script",
}
_INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


class LazyGroup(click.Group):
    """Commands live in `deploytool.cli.NAME`, as `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"deploytool.cli.{cmd_name}").command
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS:
            ctx.fail(f"no such command {args[0]!r}; {nearest(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            _give_up_stdout()  # the reader went away: `| head` is no error of ours, though click thinks so
            return 0

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))
        with formatter.section("Exit codes"):
            formatter.write_text(
                "0 done; 1 a check said no; 2 usage; 3 input refused; 4 environment; 5 backend failed; 6 integrity; "
                "7 inconclusive; 70 a bug; 130, 143 interrupted"
            )


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="deploytool %(version)s")
def cli() -> None:
    """A trained PyTorch model to a verified, measured, packaged artifact for a device."""


class Interrupted(BaseException):
    """A signal asked us to stop; unwinding ends the workers and removes temporary files."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _interrupt(number: int, _frame: object) -> NoReturn:
    raise Interrupted(number)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and leave with the contract's exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for number in _INTERRUPTED:
        signal.signal(number, _interrupt)
    code = run(given)
    try:
        sys.stdout.flush()
    except OSError:
        code = code or 4
        _give_up_stdout()  # the interpreter flushes once more on its way out
    sys.exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        result = cli.main(args=list(arguments), prog_name="deploytool", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except DeployError as error:
        return _tell(error, arguments)
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.UsageError as error:
        return _tell(_as_usage(error), arguments)
    except click.Abort:
        return 130
    except Interrupted as stop:
        return _tell_interrupted(stop, arguments)
    except OSError as error:
        return _tell(_as_environment(error), arguments)
    except Exception as error:
        return _tell(_as_bug(error), arguments)


def _give_up_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _tell(error: DeployError, arguments: Sequence[str]) -> int:
    """The error on stderr and, when asked for, as the one JSON document; the exit code stands when neither can be."""
    with contextlib.suppress(OSError):
        click.echo(str(error), err=True)
        if "--json" in arguments:
            click.echo(json.dumps({"schema_version": "1.0", "error": error.to_json()}, indent=2))
    return error.exit_code


def _tell_interrupted(stop: Interrupted, arguments: Sequence[str]) -> int:
    number = signal.Signals(stop.number)
    with contextlib.suppress(OSError):
        click.echo("interrupted", err=True)
        if "--json" in arguments:
            about: dict[str, Any] = {"kind": "Interrupted", "code": None, "message": f"interrupted by {number.name}"}
            about |= {"detail": [], "fix": None}
            click.echo(json.dumps({"schema_version": "1.0", "error": about}, indent=2))
    return _INTERRUPTED[number]


def _as_usage(error: click.UsageError) -> UsageProblem:
    command = error.ctx.command_path if error.ctx else "deploytool"
    return UsageProblem("DT201", error.format_message(), fix=f"`{command} --help` shows the usage")


def _as_environment(error: OSError) -> DeployError:
    what = f" {error.filename}" if error.filename else ""
    return EnvironmentLacking("DT403", f"files and folders must be accessible (got{what}: {error.strerror or error})")


def _as_bug(error: Exception) -> DeployError:
    """The traceback goes into a file: a user cannot do anything with it on the screen."""
    from deploytool.worker import cache_folder

    path = cache_folder() / "logs" / f"crash-{os.getpid()}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return InternalError("DT900", f"{CODES['DT900']} (got {type(error).__name__}: {error})", fix=f"report {path}")

"""Options that mean the same in every command, and the project file that they default to."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from deploytool.errors import UsageProblem
from deploytool.worker import Limits

F = TypeVar("F", bound=Callable[..., Any])
PROJECT_FILE = "deploytool.toml"
DEMO_MODEL = "digits"
_VERBOSE = "deploytool.verbose"  # in the context of a command

json_option = click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON document.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace an existing output.")
dry_run_option = click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and stop.")
seed_option = click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True,
                           help="Seed of everything random.")  # fmt: skip

samples_option = click.option("--samples", type=click.Path(path_type=Path), default=None,
                              help="For an ONNX file: inputs in an .npz file, or a folder of such files.")  # fmt: skip


class Seconds(click.ParamType):  # type: ignore[type-arg]
    """A finite number of seconds, or of another unit of time, 0 or more."""

    name = "seconds"

    def __init__(self, *, zero: bool, unit: str = "seconds"):
        self._zero = zero
        self._unit = unit

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            seconds = float(value)
        except ValueError:
            seconds = math.nan
        if not math.isfinite(seconds) or seconds < 0 or (seconds == 0 and not self._zero):
            least = ", 0 or more" if self._zero else " above 0"
            self.fail(f"{value!r} must be a number of {self._unit}{least}", param, ctx)
        return seconds


SECONDS, SECONDS_OR_NONE, DAYS = Seconds(zero=False), Seconds(zero=True), Seconds(zero=True, unit="days")


class Share(click.ParamType):  # type: ignore[type-arg]
    """A share, 0.05, or a percentage, 5%; finite, 0 or more, and at most 1 where no more can be lost."""

    name = "share"

    def __init__(self, *, most: float = math.inf):
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value)
        if text == "1" and self._most == 1.0:
            self.fail("'1' can be read as 1 % and as all of it: write 1% or 100%", param, ctx)
        try:
            share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
        except ValueError:
            share = math.nan
        if not math.isfinite(share) or not 0 <= share <= self._most:
            what = "0 or more" if self._most == math.inf else f"from 0 to {self._most:g}"
            self.fail(f"{value!r} must be a share, {what} (0.05 is 5 %)", param, ctx)
        return share


SHARE, SHARE_OF_ALL = Share(), Share(most=1.0)


class Sizes(click.ParamType):  # type: ignore[type-arg]
    """Sizes of free dimensions: batch=1,sequence=64."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> dict[str, int]:
        if isinstance(value, dict):
            return value
        parts = [re.fullmatch(r"\s*(\w+)=([1-9]\d{0,8})\s*", part) for part in str(value).split(",")]
        if not all(parts):
            self.fail(f"{value!r} must be sizes such as batch=1,sequence=64", param, ctx)
        return {part[1]: int(part[2]) for part in parts if part}


SIZES = Sizes()


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size such as 500M, 4G or a number of bytes."""

    name = "size"
    _UNITS = {"K": 10**3, "M": 10**6, "G": 10**9}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).upper().removesuffix("B")
        unit = self._UNITS.get(text[-1:], 1)
        try:
            size = int(float(text[:-1] if unit > 1 else text) * unit)
        except (ValueError, OverflowError):
            size = 0
        if size <= 0:
            self.fail(f"{value!r} must be a size such as 500M or 4G", param, ctx)
        return size


def limits_options(function: F) -> F:
    """--timeout, --memory-limit and --offline; the command gets `limits`."""

    @click.option("--timeout", type=SECONDS, default=None, help="Seconds that any one step may take.")
    @click.option("--memory-limit", type=Bytes(), default=None, help="Memory that any one process tree may take.")
    @click.option("--offline", is_flag=True, help="Never use the network, also for models that are named remotely.")
    def wrapped(*args: Any, timeout: float | None, memory_limit: int | None, offline: bool, **kwargs: Any) -> Any:
        if offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # inherited by the workers
        return function(*args, limits=Limits(timeout, memory_limit), **kwargs)

    wrapped.__doc__ = function.__doc__
    wrapped.__name__ = function.__name__
    # Options declared on the inner function have to be carried over to the wrapper.
    wrapped.__click_params__ = getattr(wrapped, "__click_params__", []) + getattr(  # type: ignore[attr-defined]
        function, "__click_params__", [])  # fmt: skip
    return wrapped  # type: ignore[return-value]


def quiet_option(function: F) -> F:
    """-q, which the command gets as `quiet`, and -v, which `say` alone looks at."""
    verbose = click.option("-v", "--verbose", is_flag=True, expose_value=False, callback=_remember_verbose,
                           help="Progress with the seconds since the start.")  # fmt: skip
    return click.option("-q", "--quiet", is_flag=True, help="No progress on stderr.")(verbose(function))


def _remember_verbose(context: click.Context, _: click.Parameter, value: bool) -> None:
    context.meta[_VERBOSE] = value


def say(quiet: bool) -> Callable[[str], None]:
    """Where progress goes: nowhere when quiet, else stderr, with -v each line after its time."""
    context = click.get_current_context(silent=True)
    if quiet:
        return lambda text: None
    if context is None or not context.meta.get(_VERBOSE):
        return lambda text: click.echo(text, err=True)
    started = time.perf_counter()

    def timed(text: str) -> None:
        for line in text.splitlines():
            click.echo(f"[{time.perf_counter() - started:7.1f} s] {line}", err=True)

    return timed


def print_json(data: Any) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(data, indent=2, allow_nan=False))


def project() -> tuple[str | None, tuple[str, ...]]:
    """Model and targets that ./deploytool.toml names; (None, ()) without that file."""
    path = Path(PROJECT_FILE)
    if not path.is_file():
        return None, ()
    from deploytool.compress.recipe import load_recipe

    recipe = load_recipe(path)
    return recipe.model, recipe.targets


def model_or_default(model: str | None, tell: Callable[[str], None]) -> str:
    """The model that was typed, else the project file's, else the shipped demo model, which is said."""
    if model is not None:
        return model
    named, _ = project()
    if named is not None:
        return named
    tell(f"no MODEL given and no {PROJECT_FILE} here: using the shipped model {DEMO_MODEL!r}")
    return DEMO_MODEL


def targets_or_default(targets: tuple[str, ...]) -> tuple[str, ...]:
    """The targets that were typed, else the project file's; none at all is an error."""
    chosen = targets or project()[1]
    if not chosen:
        raise UsageProblem("DT201", "at least one target must be named (got none)",
                           fix="add --target NAME, or --target all; `deploytool targets list` shows them")  # fmt: skip
    return chosen

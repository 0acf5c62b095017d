"""TOML files checked against a pydantic model: every error at once, with file, line and the nearest known key."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from deploytool.errors import UsageProblem, nearest

_SIZE_LIMIT_BYTES = 1_000_000


class Table(BaseModel):
    """Base of every table in a profile or recipe: unknown keys are errors, values are not converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


T = TypeVar("T", bound=BaseModel)
R = TypeVar("R")


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """The data and the text of a TOML file."""
    if path.stat().st_size > _SIZE_LIMIT_BYTES:
        raise UsageProblem("DT202", f"{path} must be smaller than 1 MB (got {path.stat().st_size} bytes)")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageProblem("DT202", f"{path} must be a TOML file in UTF-8 (got: {error})") from error


def load_toml(path: Path, model: type[T]) -> T:
    """Read and check one TOML file; raises UsageProblem with all errors, each as `file:line: ...`."""
    data, text = read_toml(path)
    return check_table(data, model, text=text, where=str(path))


def check_table(data: dict[str, Any], model: type[T], *, text: str = "", where: str, prefix: Sequence[Any] = ()) -> T:
    """Check data that came from a TOML text; `prefix` is where in that text the data stood."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        problems = sorted(_describe(e, model, text, (*prefix, *e["loc"])) for e in error.errors())
        detail = [f"{where}:{line}: {sentence}" if line else f"{where}: {sentence}" for line, sentence in problems]
        raise complain(where, detail) from error


def collect(problems: list[str], check: Callable[[], R]) -> R | None:
    """The check's result, or None with its complaints added to `problems`: so that all are told at once."""
    try:
        return check()
    except UsageProblem as error:
        problems += error.detail or (error.message,)
        return None


def complain(where: str, problems: Sequence[str]) -> UsageProblem:
    """The error that tells all of a file's problems."""
    count = f"{len(problems)} error" + ("s" if len(problems) > 1 else "")
    return UsageProblem("DT202", f"{where} must hold known keys with right values (got {count})", detail=problems)


def _describe(error: Any, model: type[BaseModel], text: str, location: Sequence[Any]) -> tuple[int, str]:
    name = ".".join(str(part) for part in location)
    line = line_of(text, location)
    if error["type"] == "extra_forbidden":
        known = _keys_at(model, error["loc"][:-1])
        return line, f"unknown key {name!r}; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return line, f"missing key {name!r}"
    return line, f"{name!r}: {error['msg']} (got {error['input']!r})"


def _keys_at(model: type[BaseModel], location: Sequence[Any]) -> list[str]:
    for part in location:
        if isinstance(part, str) and part in model.model_fields:
            annotation = model.model_fields[part].annotation
            kinds = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type)]
            nested = [t for t in kinds if issubclass(t, BaseModel)]
            if nested:
                model = nested[0]
    return [field.alias or name for name, field in model.model_fields.items()]


def line_of(text: str, location: Sequence[Any]) -> int:
    """The line (from 1) where the key at `location` stands in a TOML text; 0 when it cannot be told.

    Understands `[a.b]` and `[[a]]` headers and `key =` lines: what profiles and recipes are written in.
    """
    keys = [part for part in location if isinstance(part, str)]
    index = next((part for part in location if isinstance(part, int)), 0)
    table: list[str] = []
    seen: dict[str, int] = {}
    last = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if header := re.match(r"\s*(\[\[?)\s*([^\]]+?)\s*\]", line):
            table = [part.strip(" \"'") for part in header[2].split(".")]
            if header[1] == "[[":
                seen[table[0]] = seen.get(table[0], -1) + 1
            if table == keys[: len(table)] and seen.get(table[0], index) == index:
                last = number
                if table == keys:
                    return number
        elif (key := re.match(r"\s*([\w\"'.-]+)\s*=", line)) and seen.get(table[0] if table else "", index) == index:
            here = table + [part.strip("\"'") for part in key[1].split(".")]
            if here == keys[: len(here)]:
                return number
    return last

"""Errors that a user sees, one class per exit code.

    DeployError
      CheckFailed          1   a check said no
      UsageProblem         2   wrong option, profile or recipe
      InputRefused         3   a model, its data or a bundle cannot be taken
      EnvironmentLacking   4   a backend, driver, permission or disk space is missing
      BackendFailed        5   an engine crashed, hung or took too much memory
      IntegrityBroken      6   a checksum does not match
      Inconclusive         7   too noisy, or too few samples, to decide
      InternalError       70   our bug

A message says what must be and, in brackets, what was got; `detail` says what is known; `fix` what to do.
Each code is explained in `CODES`; its first digit is the exit code (9 for our own bugs).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

_GRAVITY = (0, 7, 1, 2, 3, 4, 5, 6, 70)


class DeployError(Exception):
    """Base of every error that deploytool raises on purpose."""

    exit_code = 70

    def __init__(self, code: str, message: str, *, detail: Sequence[str] = (), fix: str | None = None):
        super().__init__(message)
        self.code = code
        self.message = message
        self.detail = tuple(detail)
        self.fix = fix or FIXES.get(code)

    def __str__(self) -> str:
        lines = [f"error[{self.code}]: {self.message}"]
        lines += [f"  {line}" for line in self.detail]
        if self.fix:
            lines.append(f"  help: {self.fix}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The error as data: what a child process sends to its parent and `--json` prints."""
        return {
            "kind": type(self).__name__,
            "code": self.code,
            "message": self.message,
            "detail": list(self.detail),
            "fix": self.fix,
        }


def gravest(codes: Iterable[int]) -> int:
    """The exit code that stands for several: damage and crashes before refusals, those before a check's no."""
    return max(codes, key=_GRAVITY.index, default=0)


class CheckFailed(DeployError):
    """A check was made and its answer is no."""

    exit_code = 1


class UsageProblem(DeployError):
    """The command line, a profile or a recipe asks for something that does not exist."""

    exit_code = 2


class InputRefused(DeployError):
    """A model, its samples or a bundle is malformed, unsupported or unsafe."""

    exit_code = 3


class EnvironmentLacking(DeployError):
    """This machine lacks something: a package, a driver, space, a permission."""

    exit_code = 4


class BackendFailed(DeployError):
    """A child process that ran an engine crashed, hung or took too much memory."""

    exit_code = 5


class IntegrityBroken(DeployError):
    """A file is not the one that the manifest names."""

    exit_code = 6


class Inconclusive(DeployError):
    """Neither yes nor no can be said with the evidence at hand."""

    exit_code = 7


class InternalError(DeployError):
    """deploytool itself is wrong."""


CODES: dict[str, str] = {
    "DT101": "Parity failed: the artifact's outputs differ from the reference by more than the profile allows.",
    "DT103": "The bundle's self-test failed: golden inputs no longer give the golden outputs.",
    "DT104": "Compression loses more of a metric than the recipe's [quality] allows.",
    "DT105": "Compression diverged: a loss, a gradient or an output is NaN or infinite.",
    "DT106": "A search found no configuration that keeps the quality that was asked for.",
    "DT201": "The command line holds an unknown name or option, or a path that does not exist.",
    "DT202": "A TOML file (profile, recipe or project file) has unknown keys, wrong types or values out of range.",
    "DT203": "The output already exists; nothing is overwritten unless asked.",
    "DT204": "A compression step cannot be applied with these settings.",
    "DT301": "The file or folder is no model of a kind that is taken, or the model that an artifact names is not here.",
    "DT302": "The model file could not be run, or lacks build() or samples().",
    "DT303": "The samples do not fit the model: wrong names, types, ranks, NaN, or none at all.",
    "DT304": "The model's weights or outputs hold NaN or infinity.",
    "DT305": "The model could not be lowered.",
    "DT306": "The Hugging Face folder is of a kind that is not supported.",
    "DT307": "The ONNX file is empty, truncated, foreign or unsafe.",
    "DT308": "The feeds given to an engine do not fit its signature.",
    "DT309": "The folder is not an artifact, or was written by a newer deploytool.",
    "DT310": "The backend refuses an operator or a shape of this model.",
    "DT311": "The bundle is malformed or unsafe.",
    "DT312": "The file can run code when loaded; it is taken only when trusted.",
    "DT313": "The model cannot be measured with what it offers.",
    "DT314": "A compressed folder does not fit its original model: one of them has changed or is damaged.",
    "DT315": "A training checkpoint belongs to another model or to other settings.",
    "DT401": "A Python package that this target needs is missing or does not import.",
    "DT402": "A device or driver that this target needs is missing.",
    "DT403": "A file or folder cannot be written.",
    "DT404": "Another deploytool process holds the lock.",
    "DT405": "There is less disk space or memory than the model and its artifacts need at the very least.",
    "DT406": "A cluster cannot be reached, or has no node that can be used.",
    "DT501": "A worker process was ended by a signal or left without an answer.",
    "DT502": "A worker process ran longer than allowed.",
    "DT503": "A worker process took more memory than allowed.",
    "DT504": "The backend raised an error while building or running.",
    "DT601": "A file's checksum differs from the manifest, or a file is missing or was added.",
    "DT900": "An internal error: please report it with the log.",
}

# What to do where the raiser knows nothing better; codes that are left out have no such sentence.
FIXES: dict[str, str] = {
    "DT204": "see docs/compress.md for the step's settings; `deploytool inspect MODEL` shows the layers' names",
    "DT302": "see docs/models.md for what a model file holds; `deploytool init` writes one that works",
    "DT303": "see docs/models.md for what samples hold",
    "DT306": "see docs/models.md for the Hugging Face folders that are taken",
    "DT307": "export it again with the tool that wrote it",
    "DT309": "name a folder that `deploytool export` wrote, or export again",
    "DT311": "get the bundle again from whoever released it, or package it again",
    "DT314": "compress the model again",
    "DT401": "`deploytool doctor` says what to install",
    "DT403": "look at permissions and the space that is left, or name another place",
    "DT502": "allow more time with --timeout",
    "DT601": "get the files again from where they came, or make them again",
}

_KINDS = {
    c.__name__: c
    for c in (CheckFailed, UsageProblem, InputRefused, EnvironmentLacking, BackendFailed, IntegrityBroken,
              Inconclusive, InternalError)
}  # fmt: skip


def from_json(data: dict[str, Any]) -> DeployError:
    """The error that `to_json` described; an unknown kind becomes an InternalError."""
    kind = _KINDS.get(str(data.get("kind")), InternalError)
    return kind(data["code"], data["message"], detail=data.get("detail", ()), fix=data.get("fix"))


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 layer", "2 layers", "2 entries"."""
    if number == 1:
        return f"1 {noun}"
    return f"{number} {noun[:-1]}ies" if noun.endswith("y") else f"{number} {noun}s"


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that names the nearest known name, or all of them when none is near."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names) or 'none'}"

"""Runs a bundle's own self-test here, as the device would."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deploytool.bundle.manifest import SELFTEST
from deploytool.bundle.pack import TEMPLATE
from deploytool.bundle.verify import unpack, verify_bundle
from deploytool.errors import (
    BackendFailed,
    CheckFailed,
    EnvironmentLacking,
    InputRefused,
    IntegrityBroken,
    UsageProblem,
)
from deploytool.storage import sha256_file

_OUTPUT_LIMIT_BYTES = 16_000_000
_ERRORS = {1: (CheckFailed, "DT103"), 4: (EnvironmentLacking, "DT401"), 6: (IntegrityBroken, "DT601")}


def selftest(path: Path, variant: str | None = None, *, timeout: float = 600.0, trust: bool = False) -> dict[str, Any]:
    """Verify a bundle, replay its golden cases in a child process, and return what the self-test printed as JSON.

    `timeout` is in seconds. The bundle's script runs only when it is the one that this deploytool ships, or `trust` is
    set. Raises CheckFailed when an output differs or nothing was compared, EnvironmentLacking when a runtime is
    missing, BackendFailed when the child crashes or hangs, and what `verify_bundle` raises.
    """
    with unpacked(path) as folder:
        known = [v.target for v in verify_bundle(folder).variants]
        if variant is not None and variant not in known:
            raise UsageProblem("DT201", f"the variant must be one of {', '.join(known)} (got {variant!r})",
                               fix="leave --variant out to test them all")  # fmt: skip
        if not trust and sha256_file(folder / SELFTEST) != sha256_file(TEMPLATE):
            raise InputRefused("DT312", f"{SELFTEST} must be the one that this deploytool ships (got another one)",
                               fix="read it, then trust it; or use the deploytool that packed the bundle")  # fmt: skip
        result = _run(folder, variant, timeout)
    code = result["exit_code"]
    if code == 0 and result["passed"] is True:
        return result
    kind, name = _ERRORS.get(code, (CheckFailed, "DT103"))
    raise kind(name, f"the self-test of {path} must pass (got exit status {code})", detail=_said(result))


@contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """A bundle as a folder: itself, or a tar's verified content in a temporary folder."""
    if path.is_dir():
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="deploytool-") as place:
        unpack(path, Path(place) / "bundle")
        yield Path(place) / "bundle"


def _run(folder: Path, variant: str | None, timeout: float) -> dict[str, Any]:
    # -P: nothing is imported from the bundle's folder
    command = [sys.executable, "-P", str((folder / SELFTEST).resolve()), "--json"]
    command += [f"--variant={variant}"] if variant is not None else []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        try:
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, timeout=timeout,
                                  check=False)  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise BackendFailed("DT502", f"the self-test must end within {timeout:g} s (it was stopped)") from error
        out.seek(0)
        log.seek(max(0, log.seek(0, 2) - 4000))
        text, said = out.read(_OUTPUT_LIMIT_BYTES), log.read().decode(errors="replace").splitlines()[-5:]
    try:
        result = json.loads(text)
        if result["exit_code"] != done.returncode:
            raise ValueError("the exit status is not the one in the document")
    except (ValueError, KeyError, TypeError) as error:
        raise BackendFailed("DT501", f"the self-test must print its result (got exit status {done.returncode})",
                            detail=said) from error  # fmt: skip
    answer: dict[str, Any] = result
    return answer


def _said(result: dict[str, Any]) -> list[str]:
    lines = list(result["problems"])
    for variant in result["variants"]:
        if variant["status"] != "passed":
            lines.append(f"{variant['target']}: {variant['status']} {variant['reason']}".rstrip())
        lines += [f"{variant['target']} {case['case']}: {problem}"
                  for case in variant["cases"] for problem in case["problems"]]  # fmt: skip
    return lines[:40]

"""Saved figures judged again, by their own profile or another: nothing is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploytool.artifact import MANIFEST, REPORT
from deploytool.backends.base import load_checked_target
from deploytool.errors import InputRefused
from deploytool.pipeline.export import SCHEMA_VERSION
from deploytool.storage import read_json
from deploytool.target import Limits, Target, target_names
from deploytool.verify.judge import judge_parity, judge_quality
from deploytool.verify.nodes import judge_nodes


def judge_saved(path: Path, limits_of: str | None) -> dict[str, Any]:
    """The verdicts on the report at `path`: a JSON file, an artifact's folder, or an export's output.

    `limits_of` names the profile to judge by; else each artifact's own, or the shipped one of the target's name.
    Targets that failed before there were figures stay failed, with their reason.
    Raises InputRefused where there are no figures, or no profile for them.
    """
    file = path / REPORT if path.is_dir() else path
    try:
        document = read_json(file)
        found = document.get("targets", [document])
        figures = [result for result in found if result.get("parity")]
        if not figures:
            raise InputRefused("DT309", f"{file} must hold figures of parity (it has none)")
        judged = [_judged(result, _limits(result, path, limits_of)) if result.get("parity") else result
                  for result in found if result.get("parity") or result["status"] == "failed"]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputRefused(
            "DT309", f"{file} must be a report of export or verify (got: {error!r})"[:500],
            fix="name what `deploytool verify --json` printed, or an artifact's folder",
        ) from error  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "path": str(path), "targets": judged}


def _judged(result: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    wrong = judge_parity(result["parity"], limits)
    passed = not wrong
    wrong += judge_nodes(result.get("nodes"))
    wrong += judge_quality(result.get("quality") or {}, result.get("generation"), limits)
    said = "judged by saved figures: nothing was run"
    return {**result, "status": "failed" if wrong else "ok", "reason": "; ".join(wrong) or None,
            "parity": {**result["parity"], "passed": passed}, "findings": [said]}  # fmt: skip


def _limits(result: Mapping[str, Any], path: Path, limits_of: str | None) -> Limits:
    if limits_of is not None:
        return load_checked_target(limits_of).parity
    for manifest in _manifests(result, path):
        if manifest.is_file():
            try:
                return Target.model_validate(read_json(manifest)["target"], strict=False).parity
            except ValidationError as error:
                raise InputRefused("DT309", f"{manifest} must hold its profile") from error
    if result["target"] in target_names():
        return load_checked_target(result["target"]).parity
    raise InputRefused("DT309", f"the limits of {result['target']!r} must be known (its artifact is not here)",
                       fix="name a profile with --limits-of")  # fmt: skip


def _manifests(result: Mapping[str, Any], path: Path) -> Iterator[Path]:
    folder = path if path.is_dir() else path.parent
    yield folder / str(result["target"]) / MANIFEST
    yield folder / MANIFEST
    if result.get("artifact"):
        yield Path(result["artifact"]) / MANIFEST

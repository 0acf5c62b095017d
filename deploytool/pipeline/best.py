"""The better of a quantized artifact and its plain one, as measured: what loses precision must buy something."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import Any

from deploytool.report.rows import speedup_text
from deploytool.target import Target


def against_plain(target: Target, plain: Mapping[str, Any]) -> str:
    """How the artifact's speed is to that of its plain one, in a sentence; `plain` is its entry of "against"."""
    return _beside(target, f"the plain {target.plain}", plain)


def against_uncompressed(target: Target, original: Mapping[str, Any]) -> str:
    """How a compressed model's artifact is to the plain one of the uncompressed model; `original` is its entry."""
    return _beside(target, f"{target.plain or target.name} of the uncompressed model", original)


def _beside(target: Target, other: str, figures: Mapping[str, Any]) -> str:
    ratio = "" if figures["speedup"] is None else f" ({speedup_text(figures)})"
    word = {"slower": "slower than", "same": "as fast as"}.get(figures["verdict"], "not shown to be faster than")
    return f"{target.name} is {word} {other}{ratio}"


def no_better(target: Target, result: Mapping[str, Any]) -> str | None:
    """Why a finished artifact is no better than its plain one; None where it is, or where nothing was timed.

    Better is what was shown to be faster, or to be as fast and is smaller.
    """
    if target.plain is None or result["status"] != "ok" or not result["speed"]:
        return None
    plain = result["speed"]["against"][target.plain]
    if plain["verdict"] == "faster" or (plain["verdict"] == "same" and result["size_bytes"] < plain["size_bytes"]):
        return None
    return f"{against_plain(target, plain)}, so {target.plain} was kept"


def plain_instead(target: Target, result: Mapping[str, Any], why: str, plain: Mapping[str, Any]) -> dict[str, Any]:
    """The plain artifact's result under the target's name; its own artifact is removed, so that none ships it.

    Where the plain one failed there is nothing to give way to, and the finding says so.
    """
    if plain["status"] != "ok":
        said = f"{why}; but it cannot be: {plain['reason']}"
        return {**result, "findings": [*result["findings"], said]}
    shutil.rmtree(result["artifact"])
    return {**plain, "target": target.name, "kept": target.plain, "findings": [*plain["findings"], why]}

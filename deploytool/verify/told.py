"""What a bisection found, in lines for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_HEADS = {"node": "first wrong node", "fusion": "wrong from here on", "accumulated": "errors add up, half by"}


def described(found: Mapping[str, Any]) -> list[str]:
    """Node, module, errors and likely cause; then the others that are wrong, and how many tensors are right."""
    if found["found"] == "nothing":
        return [str(found["sentence"])]
    module = f" in module {found['module']}" if found["module"] else ""
    errors = " -> ".join("not comparable" if found[key] is None else f"{found[key]:.3g}"
                         for key in ("error_before", "error_after"))  # fmt: skip
    lines = [
        f"{_HEADS[found['found']]}: {found['kind']} {found['node']}{module} (case {found['case']})",
        f"error before -> after it: {errors}",
        f"likely cause: {found['cause']}: {found['sentence']}",
    ]
    lines += [f"also wrong by itself: {o['kind']} {o['node']}" for o in found["others"]]
    return [*lines, str(found["sound"])]

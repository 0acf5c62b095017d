"""A student from its teacher: the heads and neurons that count most stay, with their weights.

What a removed unit gave is made good for in the layer that read it, so that training starts near the teacher. The way
to choose and to fit is that of structured pruning (`prune/structured.py`). Source for heads and inner widths by
importance: Hou et al., "DynaBERT", NeurIPS 2020, section 2.1.
"""

from __future__ import annotations

from typing import Any, Literal

from deploytool.compress.distill.tables import Narrow
from deploytool.compress.prune.structured import apply as remove
from deploytool.compress.prune.tables import Structured
from deploytool.compress.step import Context
from deploytool.source import Source

_Units = Literal["heads", "neurons", "channels"]


def apply(source: Source, settings: Narrow, context: Context) -> tuple[Source, dict[str, Any]]:
    """A copy with thinner layers; the kinds of units are taken one after the other."""
    layers: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    shares: dict[_Units, float | None]
    shares = {"heads": settings.heads, "neurons": settings.neurons, "channels": settings.channels}
    for units, share in shares.items():
        if share is None:
            continue
        wanted = Structured(step="structured", remove=1.0 - share, units=(units,), importance=settings.importance,
                            include=settings.include, exclude=settings.exclude)  # fmt: skip
        source, did = remove(source, wanted, context)
        layers += did["layers"]
        skipped += did["skipped"]
    thinner = {name for entry in layers for name in (*entry["makers"], *entry["readers"])}
    return source, {"layers": layers, "skipped": [entry for entry in skipped if entry["layer"] not in thinner]}

"""A student from its teacher: some of a list of blocks stay, with their weights.

Source: Sanh et al., "DistilBERT", 2019, section 3 (every second layer); Fan et al., "LayerDrop", ICLR 2020.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from deploytool.compress.distill.tables import DropLayers
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem, nearest
from deploytool.load.surgery import apply_edits, with_module
from deploytool.source import Source

_CACHE = "past_key_values"


def spread_evenly(count: int, keep: int) -> list[int]:
    """`keep` of the numbers 0 .. count - 1, the first and the last among them where there are two."""
    if keep == 1:
        return [0]
    return [round(index * (count - 1) / (keep - 1)) for index in range(keep)]


def apply(source: Source, settings: DropLayers, context: Context) -> tuple[Source, dict[str, Any]]:
    """A copy with fewer blocks; masks and encodings of those that stay go with them."""
    lists = {name: m for name, m in source.module.named_modules() if isinstance(m, (nn.ModuleList, nn.Sequential))}
    if settings.blocks not in lists:
        raise UsageProblem("DT204", f"blocks must name a list of layers (got {settings.blocks!r})",
                           detail=[nearest(settings.blocks, lists)])  # fmt: skip
    if cached := [n for n in source.signature.input_names if n.startswith(_CACHE)]:
        raise UsageProblem("DT204", "drop-layers cannot change a model that takes a cache of every layer (got input "
                           f"{cached[0]})")  # fmt: skip
    count = len(lists[settings.blocks])
    kept = list(settings.layers) or spread_evenly(count, settings.keep or 1)
    if len(kept) >= count or kept[-1] >= count:
        raise UsageProblem("DT204", f"{settings.blocks} has {count} layers: fewer must stay (got {len(kept)}: "
                           f"{', '.join(map(str, kept))})")  # fmt: skip
    edit = {"kind": "keep_items", "layer": settings.blocks, "items": kept}
    module = copy.deepcopy(source.module)
    apply_edits(module, [edit])
    context.progress(f"drop-layers: {len(kept)} of {count} {settings.blocks} stay")
    names = {f"{settings.blocks}.{old}.": f"{settings.blocks}.{new}." for new, old in enumerate(kept)}
    changed = with_module(
        source, module, edits=(*source.edits, edit), masks=_renamed(source.masks, settings.blocks, names),
        encodings=_renamed(source.encodings, settings.blocks, names),
    )  # fmt: skip
    return changed, {"blocks": settings.blocks, "before": count, "kept": kept, "layers": [], "skipped": []}


def _renamed(entries: Any, blocks: str, names: dict[str, str]) -> dict[str, Any]:
    """Entries by their parameters' new names; those of blocks that went are left out."""
    renamed = {}
    for name, value in entries.items():
        old = next((prefix for prefix in names if name.startswith(prefix)), None)
        if old is not None:
            renamed[names[old] + name[len(old) :]] = value
        elif not name.startswith(f"{blocks}."):
            renamed[name] = value
    return renamed

"""torch's fused attention modules become equal modules of plain linears; equality is checked at each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from deploytool.compress.attention.tables import PlainAttention
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.load.plain_attention import fused_names, largest_difference, plain, why_fused
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source


def apply(source: Source, settings: PlainAttention, context: Context) -> tuple[Source, dict[str, Any]]:
    """Replace the chosen modules of a copy; raises UsageProblem when the model holds none."""
    module = shell(source.module)
    found = [name for name in fused_names(module) if name]
    skipped = [{"layer": name, "reason": reason} for name, reason in why_fused(module).items()]
    if not found:
        raise UsageProblem("DT204", "plain-attention must find nn.MultiheadAttention, nn.TransformerEncoderLayer or "
                           "nn.TransformerEncoder in the model (got none that it can replace)",
                           detail=[f"{row['layer']}: {row['reason']}" for row in skipped],
                           fix="leave the step out: projections that are linears already need it not")  # fmt: skip
    chosen = select(found, settings.include, settings.exclude)
    skipped += [{"layer": n, "reason": "not chosen by include and exclude"} for n in found if n not in chosen]
    layers = []
    for name in [n for n in found if n in chosen]:
        fused = module.get_submodule(name)
        made = plain(fused)
        replace_layer(module, name, made)
        layers.append({"layer": name, "kind": type(fused).__name__, "difference": largest_difference(fused, made)})
        context.progress(f"plain-attention: {name}, a {type(fused).__name__}")
    edits = [{"kind": "plain_attention", "layer": row["layer"]} for row in layers]
    masks = _carried(source.masks, set(dict(module.named_parameters())))
    return with_module(source, module, edits=(*source.edits, *edits), masks=masks), {
        "layers": layers, "skipped": skipped,
    }  # fmt: skip


def _carried(masks: Mapping[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """The masks under the names that the parameters have now; that of a joined projection in its three parts."""
    carried: dict[str, Tensor] = {}
    for name, mask in masks.items():
        owner, _, leaf = name.rpartition(".")
        parts = dict(zip("qkv", mask.chunk(3), strict=True)) if leaf == "in_proj_weight" else {leaf[:1]: mask}
        moved = {name: mask} if name in names else {f"{owner}.{part}.weight": m for part, m in parts.items()}
        carried |= {new: m for new, m in moved.items() if new in names}
    return carried

"""Attention by blocks or of a sparse pattern, in every module that asks torch for attention; found by running it."""

from __future__ import annotations

from typing import Any

from deploytool.compress.attention.tables import BlockwiseAttention, LocalAttention
from deploytool.compress.calls import plain_forward
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.attention_routing import Pattern, Site, attention_sites, reroute
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source


def apply(
    source: Source, settings: BlockwiseAttention | LocalAttention, context: Context
) -> tuple[Source, dict[str, Any]]:  # fmt: skip
    """Give the chosen modules of a copy another way to compute their attention; weights stay as they are."""
    sites = {site.name: site for site in find_sites(source, settings.step)}
    chosen = select(sites, settings.include, settings.exclude)
    pattern = _pattern(settings)
    changed = with_module(source, shell(source.module))
    layers, skipped, edits = [], [], []
    for name, site in sites.items():
        reason = _why_not(site, pattern) if name in chosen else "not chosen by include and exclude"
        if reason:
            skipped.append({"layer": name, "reason": reason})
            continue
        reroute(changed.module, name, pattern)
        edits.append({"kind": "attention_pattern", "layer": name, "pattern": pattern.to_json()})
        layers.append({"layer": name, **pattern.to_json(), "tokens": max(q for q, _ in site.shapes)})
        context.progress(f"{settings.step}: {name}")
    return with_module(changed, changed.module, edits=(*source.edits, *edits)), {"layers": layers, "skipped": skipped}


def find_sites(source: Source, step: str) -> list[Site]:
    """The modules that compute attention on the first sample; raises UsageProblem where there are none."""
    sample = next(iter(source.samples()), None)
    if sample is None:
        raise InputRefused("DT303", f"{step} needs at least one sample (got none)",
                           fix="let samples() of the model give some")  # fmt: skip
    arguments = [sample[name] for name in source.signature.input_names]
    with plain_forward():
        sites = attention_sites(source.module, lambda: source.flat(*arguments))
    if not sites:
        raise UsageProblem("DT204", f"{step} must find modules that call scaled_dot_product_attention (got none)",
                           detail=["attention that is written out as products and a softmax is not recognized"],
                           fix="run step plain-attention before it for torch's own modules; load Hugging Face models "
                               "with attn_implementation='sdpa'")  # fmt: skip
    return sites


def _pattern(settings: BlockwiseAttention | LocalAttention) -> Pattern:
    if isinstance(settings, BlockwiseAttention):
        return Pattern(block=settings.block)
    return Pattern(window=settings.window, stride=settings.stride, globals_=settings.global_tokens)


def _why_not(site: Site, pattern: Pattern) -> str | None:
    if pattern.window and any(queries != keys for queries, keys in site.shapes):
        return "its queries and keys are not of the same tokens"
    return None

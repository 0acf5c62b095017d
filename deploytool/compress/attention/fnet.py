"""Attention modules become Fourier mixing, each channel as strong as what the attention gave on the samples.

Source: Lee-Thorp et al., "FNet", NAACL 2022. The paper trains from the start; here the gains start where the strength
of each channel on the samples stays what it was, and distillation has little to win back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.attention.routed import find_sites
from deploytool.compress.attention.tables import Fnet
from deploytool.compress.blocks import check_samples
from deploytool.compress.calls import Call, plain_forward
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.load.fourier import FourierMixing
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source

_FAINT = 1e-6


@dataclass
class _Seen:
    """One call of an attention module: its arguments and what it gave."""

    call: Call
    given: Any


def apply(source: Source, settings: Fnet, context: Context) -> tuple[Source, dict[str, Any]]:
    """Replace the chosen modules of a copy; gains come from what the modules give on the samples."""
    sites = [site.name for site in find_sites(source, settings.step)]
    chosen = select(sites, settings.include, settings.exclude)
    samples = context.samples(source)
    check_samples(samples)
    seen = _watch(source, [name for name in sites if name in chosen], samples)
    changed = with_module(source, shell(source.module))
    layers: list[dict[str, Any]] = []
    skipped = [{"layer": n, "reason": "not chosen by include and exclude"} for n in sites if n not in chosen]
    edits = []
    for name, calls in seen.items():
        edit = {"kind": "fourier", "layer": name} | _form(calls)
        reason = edit.pop("reason", None)
        if reason or not name:
            skipped.append({"layer": name, "reason": reason or "it is the whole model"})
            continue
        before = sum(p.numel() for p in changed.module.get_submodule(name).parameters())
        mixing = FourierMixing(edit["width"], edit["tokens"], edit["keyword"], edit["outputs"])
        mixing.gain = nn.Parameter(_gain(mixing, calls), requires_grad=False)
        replace_layer(changed.module, name, mixing)
        edits.append(edit)
        layers.append({"layer": name, "width": edit["width"], "tokens": edit["tokens"], "parameters_before": before,
                       "parameters_after": edit["width"]})  # fmt: skip
        context.progress(f"fnet: {name}")
    left = set(dict(changed.module.named_parameters()))
    masks = {name: mask for name, mask in source.masks.items() if name in left}
    report = {"layers": layers, "skipped": skipped}
    return with_module(changed, changed.module, edits=(*source.edits, *edits), masks=masks), report


def _watch(source: Source, names: Sequence[str], samples: Sequence[dict[str, Tensor]]) -> dict[str, list[_Seen]]:
    found: dict[str, list[_Seen]] = {name: [] for name in names}
    handles = [source.module.get_submodule(name).register_forward_hook(
        lambda m, args, kwargs, out, n=name: found[n].append(_Seen((args, kwargs), out)), with_kwargs=True)
        for name in names]  # fmt: skip
    try:
        with plain_forward():
            for sample in samples:
                source.flat(*(sample[n] for n in source.signature.input_names))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _form(seen: Sequence[_Seen]) -> dict[str, Any]:
    """What a replacement must know: width, tokens, keyword, outputs; or the reason why there is none."""
    (args, kwargs), given = seen[0].call, seen[0].given
    keyword = None if args else next((n for n, v in kwargs.items() if isinstance(v, Tensor)), None)
    first = args[0] if args else kwargs.get(keyword or "")
    outputs = len(given) if isinstance(given, tuple) else 0
    mixed = given[0] if isinstance(given, tuple) and given else given
    if not isinstance(first, Tensor) or not isinstance(mixed, Tensor) or first.ndim < 3:
        return {"reason": "its input and output must be tensors [batch, tokens, width]"}
    if mixed.shape != first.shape:
        return {"reason": f"its output {list(mixed.shape)} must be of its input's shape {list(first.shape)}"}
    if isinstance(given, tuple) and any(value is not None for value in given[1:]):
        return {"reason": "it returns more than its mixture, which others may read"}
    if any(isinstance(x, Tensor) and x is not first and x.shape == first.shape and not torch.equal(x, first)
           for x in (*args, *kwargs.values())):  # fmt: skip
        return {"reason": "it attends to another sequence"}
    lengths = {(s.call[0][0] if keyword is None else s.call[1][keyword]).shape[-2] for s in seen}
    return {"width": first.shape[-1], "tokens": lengths.pop() if len(lengths) == 1 else None, "keyword": keyword,
            "outputs": outputs}  # fmt: skip


def _gain(mixing: FourierMixing, seen: Sequence[_Seen]) -> Tensor:
    """Per channel the standard deviation of what attention gave over that of what the mixing gives."""
    wanted, given = [], []
    with torch.no_grad():
        for one in seen:
            before = one.given[0] if isinstance(one.given, tuple) else one.given
            made = mixing(*one.call[0], **one.call[1])
            wanted.append(before.flatten(0, -2))
            given.append((made[0] if isinstance(made, tuple) else made).flatten(0, -2))
    return torch.cat(wanted).std(dim=0) / torch.cat(given).std(dim=0).clamp(min=_FAINT)

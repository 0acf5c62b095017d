"""Attention modules become Fourier mixing, each channel as strong as what the attention gave on the samples.

Source: Lee-Thorp et al., "FNet", NAACL 2022. The paper trains from the start; here the gains start where the strength
of each channel on the samples stays what it was, and distillation has little to win back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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


class _Spread:
    """The standard deviation of every column of rows [n, width] that come in parts, in float64.

    Source: Chan, Golub, LeVeque, "Algorithms for computing the sample variance", The American Statistician 1983.
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros((), dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """More rows [..., width]."""
        rows = values.flatten(0, -2).double()
        mean = rows.mean(dim=0)
        off, count = mean - self._mean, self._count + len(rows)
        self._squares = (self._squares + (rows - mean).square().sum(dim=0)
                         + off.square() * (self._count * len(rows) / count))  # fmt: skip
        self._mean, self._count = self._mean + off * (len(rows) / count), count

    def std(self) -> Tensor:
        """[width], float32."""
        return (self._squares / (self._count - 1)).sqrt().float()


@dataclass
class _Seen:
    """What all calls of an attention module came to: how it is called, and how strong it and the mixing in its place
    were. `form` says what is to be known of the replacement, or the "reason" why there is none."""

    form: dict[str, Any]
    mixing: FourierMixing | None
    wanted: _Spread = field(default_factory=_Spread)
    made: _Spread = field(default_factory=_Spread)
    varies: bool = False  # its inputs have several lengths, of which the mixing was made for one


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
    for name, site in seen.items():
        edit = {"kind": "fourier", "layer": name} | site.form
        reason = edit.pop("reason", None)
        if reason or not name:
            skipped.append({"layer": name, "reason": reason or "it is the whole model"})
            continue
        before = sum(p.numel() for p in changed.module.get_submodule(name).parameters())
        mixing = FourierMixing(edit["width"], edit["tokens"], edit["keyword"], edit["outputs"])
        gain = site.wanted.std() / site.made.std().clamp(min=_FAINT)
        mixing.gain = nn.Parameter(gain, requires_grad=False)
        replace_layer(changed.module, name, mixing)
        edits.append(edit)
        layers.append({"layer": name, "width": edit["width"], "tokens": edit["tokens"], "parameters_before": before,
                       "parameters_after": edit["width"]})  # fmt: skip
        context.progress(f"fnet: {name} ({len(edits)} of {len(seen)} modules)")
    left = set(dict(changed.module.named_parameters()))
    masks = {name: mask for name, mask in source.masks.items() if name in left}
    report = {"layers": layers, "skipped": skipped}
    return with_module(changed, changed.module, edits=(*source.edits, *edits), masks=masks), report


def _watch(source: Source, names: Sequence[str], samples: Sequence[dict[str, Tensor]]) -> dict[str, _Seen]:
    """What is to be known of every named module that runs. Where inputs turn out to have several lengths the samples
    are run once more, with a mixing that fits all of them."""
    seen = _watch_once(source, names, samples, {})
    varied = {name: {**site.form, "tokens": None} for name, site in seen.items() if site.varies}
    return seen | _watch_once(source, list(varied), samples, varied) if varied else seen


def _watch_once(
    source: Source, names: Sequence[str], samples: Sequence[dict[str, Tensor]], forms: Mapping[str, dict[str, Any]]
) -> dict[str, _Seen]:
    found: dict[str, _Seen] = {}

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any) -> None:
        if name not in found:
            form = forms.get(name) or _form((args, kwargs), given)
            found[name] = _Seen(form, None if "reason" in form else FourierMixing(**form))
        _add(found[name], (args, kwargs), given)

    handles = [source.module.get_submodule(name).register_forward_hook(
        lambda m, args, kwargs, out, n=name: look(n, args, kwargs, out), with_kwargs=True)
        for name in names]  # fmt: skip
    try:
        with plain_forward():
            for sample in samples:
                source.flat(*(sample[n] for n in source.signature.input_names))
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in names if name in found}


def _add(site: _Seen, call: Call, given: Any) -> None:
    if site.mixing is None:
        return
    keyword = site.form["keyword"]
    tokens = (call[0][0] if keyword is None else call[1][keyword]).shape[-2]
    site.varies = site.varies or site.form["tokens"] not in (None, tokens)
    if not site.varies:
        made = site.mixing(*call[0], **call[1])
        for spread, value in ((site.wanted, given), (site.made, made)):
            spread.add(value[0] if isinstance(value, tuple) else value)


def _form(call: Call, given: Any) -> dict[str, Any]:
    """What a replacement must know: width, tokens, keyword, outputs; or the reason why there is none."""
    args, kwargs = call
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
    return {"width": first.shape[-1], "tokens": first.shape[-2], "keyword": keyword, "outputs": outputs}

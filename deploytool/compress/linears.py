"""Layers that compute what nn.Linear does become one, so that every step reaches them."""

from __future__ import annotations

import torch
from torch import Tensor

from deploytool.compress.calls import plain_forward
from deploytool.compress.select import shared_names
from deploytool.load.linears import as_linear
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source

_SAME = 1e-4  # of an output's largest value: sums in another order, through the whole model


def with_linears(source: Source) -> tuple[Source, list[str]]:
    """A copy with such layers replaced, and their names; the source itself where there are none.

    Also itself where the model then gives something else on the first sample: it reads their weights in its own way.
    """
    shared = shared_names(source.module)
    made = {name: linear for name, layer in source.module.named_modules()
            if name and f"{name}.weight" not in {*shared, *source.masks, *source.encodings}
            and (linear := as_linear(layer)) is not None}  # fmt: skip
    if not made:
        return source, []
    module = shell(source.module)
    for name, linear in made.items():
        replace_layer(module, name, linear)
    edits = [{"kind": "linear", "layer": name, "inputs": linear.in_features, "outputs": linear.out_features}
             for name, linear in made.items()]  # fmt: skip
    changed = with_module(source, module, edits=(*source.edits, *edits))
    return (changed, list(made)) if _alike(source, changed) else (source, [])


def _alike(source: Source, changed: Source) -> bool:
    sample = next(iter(source.samples()))
    inputs = [sample[name] for name in source.signature.input_names]
    with plain_forward():
        wanted = source.flat(*(tensor.clone() for tensor in inputs))
        try:
            given = changed.flat(*(tensor.clone() for tensor in inputs))
        except Exception:  # whatever a foreign model raises where a layer of its own is missing
            return False
    return all(_near(a, b) for a, b in zip(given, wanted, strict=True))


def _near(given: Tensor, wanted: Tensor) -> bool:
    if not wanted.is_floating_point() or not wanted.numel():
        return torch.equal(given, wanted)
    return torch.allclose(given, wanted, rtol=0, atol=_SAME * float(wanted.abs().max()), equal_nan=True)

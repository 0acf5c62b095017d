"""Mixed precision: layers that the outputs depend on most get more bits, out of one budget for all.

A layer's sensitivity is measured: how far the model's outputs move on calibration samples when this layer alone is
rounded to the fewest bits. For more bits the movement is taken to fall as the squared rounding error of its weights
does. The budget is spent one step at a time where a bit buys most: the greedy way along the convex hull of every
layer's choices (Shoham and Gersho, "Efficient bit allocation for an arbitrary set of quantizers", IEEE Transactions on
Acoustics, Speech and Signal Processing 36, 1988).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deploytool.compress.blocks import check_samples
from deploytool.compress.calls import plain_forward
from deploytool.compress.matrices import matrix
from deploytool.compress.quantize.layers import bits_per_weight, chosen_layers, group_of
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.tables import Gptq, MixedPrecision, Rtn
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.load.grid import snap
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

_LOGITS = "logits"
_SAMPLES = 4


@dataclass(frozen=True)
class Choice:
    """One width of one layer: what it costs, in bits, and how far it moves the outputs."""

    bits: int
    cost: float
    loss: float


def allocate(layers: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, int]:
    """Bits per layer with a total cost of at most `budget` bits; each layer's choices are in the order of their cost.

    Raises UsageProblem when not even the cheapest choices fit.
    """
    hulls = {name: _hull(choices) for name, choices in layers.items()}
    at = dict.fromkeys(hulls, 0)
    spent = sum(hull[0].cost for hull in hulls.values())
    if spent > budget:
        raise UsageProblem("DT204", f"mean_bits must leave room for the smallest of choices (it takes {spent:g} bits "
                           f"of {budget:g})", fix="raise mean_bits, or allow fewer bits in choices")  # fmt: skip
    while True:
        pairs = {name: hull[at[name] : at[name] + 2] for name, hull in hulls.items() if at[name] + 1 < len(hull)}
        worth = {name: _worth(*pair) for name, pair in pairs.items() if spent - pair[0].cost + pair[1].cost <= budget}
        if not worth:
            return {name: hulls[name][index].bits for name, index in at.items()}
        name = max(worth, key=lambda name: (worth[name], name))
        spent += pairs[name][1].cost - pairs[name][0].cost
        at[name] += 1


def apply(source: Source, settings: MixedPrecision, context: Context) -> tuple[Source, dict[str, Any]]:
    """Measure, allocate, and quantize a copy with the method that the settings name."""
    work = with_module(source, shell(source.module))
    picked, _ = chosen_layers(work.module, settings)
    widths = sorted(set(settings.choices))
    samples = context.samples(source)
    check_samples(samples)
    change = _Change(work, samples)
    choices = {}
    for number, (name, layer) in enumerate(picked.items(), start=1):
        choices[name] = _choices(layer, widths, settings, change)
        if number % 20 == 0 or number == len(picked):
            context.progress(f"mixed-precision: {number} of {len(picked)} layers measured")
    total = sum(matrix(layer).numel() for layer in picked.values())
    bits = allocate(choices, settings.mean_bits * total)
    table = {"gptq": Gptq, "rtn": Rtn}[settings.method]
    shared = {key: getattr(settings, key) for key in ("group", "symmetric", "search", "include", "exclude")}
    method = table(step=settings.method, **shared)
    out, report = importlib.import_module(method.code).apply(source, method, context, bits=bits)
    for entry in report["layers"]:
        entry["sensitivity"] = choices[entry["layer"]][0].loss
    spent = sum(entry["bits_per_weight"] * matrix(picked[entry["layer"]]).numel() for entry in report["layers"])
    counts = {str(width): sum(b == width for b in bits.values()) for width in widths}
    return out, {**report, "mean_bits": spent / total, "layers_by_bits": counts}


def _choices(layer: nn.Module, widths: Sequence[int], settings: MixedPrecision, change: _Change) -> list[Choice]:
    weight = matrix(layer)
    found: list[Choice] = []
    measured = coarsest = 0.0
    for width in widths:
        encoding = choose(weight, width, group_of(weight, settings.group), settings.symmetric)
        rounded = snap(weight, encoding)
        error = float((rounded.float() - weight.float()).square().sum())
        if not found:
            measured, coarsest = change.with_matrix(layer, rounded), error
        loss = measured * error / coarsest if coarsest > 0 else 0.0
        found.append(Choice(width, bits_per_weight(encoding, weight.numel()) * weight.numel(), loss))
    return found


class _Change:
    """How far the outputs are from the unchanged model's on a few samples: the squared distance over the squared size.

    The logits where there are any: the caches beside them repeat what happens inside.
    """

    def __init__(self, source: Source, samples: Sequence[dict[str, Tensor]]) -> None:
        self._source = source
        self._samples = samples[:: max(1, len(samples) // _SAMPLES)][:_SAMPLES]
        names = source.signature.output_names
        self._taken = [names.index(_LOGITS)] if _LOGITS in names else list(range(len(names)))
        self._before = list(self._outputs())

    def with_matrix(self, layer: nn.Module, values: Tensor) -> float:
        """The change when a layer has these values [out, in] for a moment."""
        own = layer.get_parameter("weight")
        layer.weight = nn.Parameter(values.view(own.shape), requires_grad=False)
        try:
            pairs = zip(self._outputs(), self._before, strict=True)
            return sum(float((a - b).square().sum() / b.square().sum().clamp(min=1e-30)) for a, b in pairs)
        finally:
            layer.weight = own

    def _outputs(self) -> Iterable[Tensor]:
        names = self._source.signature.input_names
        for sample in self._samples:
            with plain_forward():
                outputs = self._source.flat(*(sample[name] for name in names))
            yield from (outputs[i].float() for i in self._taken if outputs[i].is_floating_point())


def _worth(now: Choice, then: Choice) -> float:
    return (now.loss - then.loss) / (then.cost - now.cost)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """The choices of which every further bit buys less than the one before: the lower convex hull."""
    hull: list[Choice] = []
    for choice in choices:
        while hull and (choice.loss >= hull[-1].loss or
                        (len(hull) > 1 and _worth(hull[-1], choice) >= _worth(hull[-2], hull[-1]))):  # fmt: skip
            if choice.loss >= hull[-1].loss:
                break
            hull.pop()
        if not hull or choice.loss < hull[-1].loss:
            hull.append(choice)
    return hull

"""Mixed precision: the allocation against trying everything, and the step within its budget."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from deploytool.compress.quantize.mixed import Choice, allocate, apply
from deploytool.compress.quantize.rtn import apply as rtn
from deploytool.compress.quantize.tables import MixedPrecision, Rtn
from deploytool.compress.recipe import parse_recipe
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.grid import lies_on
from deploytool.source import Source


def _layers(count: int) -> dict[str, list[Choice]]:
    generator = torch.Generator().manual_seed(count)
    sizes = torch.randint(1, 9, (count,), generator=generator).tolist()
    losses = torch.rand(count, generator=generator).tolist()
    return {f"l{i}": [Choice(b, b * sizes[i], losses[i] * 4.0**-b) for b in (2, 3, 4, 8)] for i in range(count)}


def _total(layers: dict[str, list[Choice]], bits: dict[str, int]) -> tuple[float, float]:
    picked = [next(c for c in layers[name] if c.bits == b) for name, b in bits.items()]
    return sum(c.cost for c in picked), sum(c.loss for c in picked)


@pytest.mark.parametrize("count", [1, 3, 5])
@pytest.mark.parametrize("mean", [2.0, 2.7, 3.5, 5.0, 8.0])
def test_allocation_is_near_the_best_of_all(count: int, mean: float) -> None:
    """It must stay within the budget, and lose no more than the best of all allocations with a little less to spend."""
    layers = _layers(count)
    budget = mean * sum(choices[0].cost for choices in layers.values()) / 2
    cost, loss = _total(layers, allocate(layers, budget))
    assert cost <= budget
    largest = max(b.cost - a.cost for choices in layers.values() for a, b in itertools.pairwise(choices))
    every = itertools.product(*layers.values())
    fitting = [sum(c.loss for c in chosen) for chosen in every if sum(c.cost for c in chosen) <= budget - largest]
    assert loss <= min(fitting, default=float("inf")) + 1e-12
    equal = max((b for b in (2, 3, 4, 8) if _total(layers, dict.fromkeys(layers, b))[0] <= budget), default=2)
    assert loss <= _total(layers, dict.fromkeys(layers, equal))[1] + 1e-12


def test_a_layer_that_nothing_depends_on_gets_least() -> None:
    """Bits must go where they help; a budget below the least must be refused."""
    layers = {"idle": [Choice(2, 2, 0.0), Choice(8, 8, 0.0)], "live": [Choice(2, 2, 1.0), Choice(8, 8, 0.001)]}
    assert allocate(layers, 100) == {"idle": 2, "live": 8}
    with pytest.raises(UsageProblem, match="must leave room"):
        allocate(layers, 3)


def _apply(source: Source, context: Context, **settings: Any) -> tuple[Source, dict[str, Any]]:
    return apply(source, MixedPrecision(step="mixed-precision", **settings), context)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_step_stays_within_its_budget(tiny: Source, context: Context, method: Any) -> None:
    """The mean of bits with scales must be at most what was asked, every weight on its grid, the sensitivity told."""
    before = {name: tensor.clone() for name, tensor in tiny.module.state_dict().items()}
    out, report = _apply(tiny, context, mean_bits=6.5, choices=(2, 4, 8), group=20, method=method)
    assert report["mean_bits"] <= 6.5 and sum(report["layers_by_bits"].values()) == 2
    assert {entry["bits"] for entry in report["layers"]} <= {2, 4, 8} and max(
        entry["bits"] for entry in report["layers"]
    ) > 2
    assert all(entry["sensitivity"] > 0 for entry in report["layers"])
    assert all(lies_on(out.module.get_parameter(name), e) for name, e in out.encodings.items())
    assert all(torch.equal(before[name], t) for name, t in tiny.module.state_dict().items())


def test_the_more_sensitive_layer_gets_the_bits(tiny: Source, context: Context) -> None:
    """With room for one wide layer it must be the one whose rounding moves the outputs more."""
    out, report = _apply(tiny, context, mean_bits=7.6, choices=(3, 8), group="channel", method="rtn")
    bits = {entry["layer"]: entry["bits"] for entry in report["layers"]}
    assert sorted(bits.values()) == [3, 8]
    wide = max(report["layers"], key=lambda entry: entry["sensitivity"])["layer"]
    assert bits[wide] == 8
    other = {"up": "down", "down": "up"}[wide]
    swapped, _ = rtn(tiny, Rtn(step="rtn", bits=3, group="channel"), context, bits={other: 8})
    ids = next(iter(tiny.samples()))["ids"]
    distance = [(s.flat(ids)[0] - tiny.flat(ids)[0]).square().sum() for s in (out, swapped)]
    assert distance[0] < distance[1]


@pytest.mark.parametrize("wrong", [{"choices": [4]}, {"choices": [4, 9]}, {"mean_bits": 1.0}, {"method": "best"}, {}])
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    """One choice, widths that cannot be, a budget below two bits, an unknown method or no budget must be refused."""
    table = {"step": "mixed-precision", **({"mean_bits": 5.0} if wrong and "mean_bits" not in wrong else {}), **wrong}
    with pytest.raises(UsageProblem):
        parse_recipe({"compress": [table]}, "", where="r.toml")


def test_a_budget_below_the_least_is_refused(tiny: Source, context: Context) -> None:
    """Scales count too: three bits do not fit into three."""
    with pytest.raises(UsageProblem, match="must leave room"):
        _apply(tiny, context, mean_bits=3.0, choices=(3, 4))


@pytest.mark.parametrize("samples", [[], [{"ids": torch.full((1, 3), torch.nan)}]])
def test_samples_that_measure_nothing_are_refused(tiny: Source, context: Context, samples: list[Any]) -> None:
    """Without samples, or with NaN in them, there is no sensitivity: no bits may be given out."""
    source = dataclasses.replace(tiny, samples=lambda: iter(samples))
    with pytest.raises(InputRefused, match="calibration"):
        _apply(source, context, mean_bits=6.5, method="rtn")

"""What the layers that read removable units take in, and what they have to give for the model to stay as it was.

A layer Y = W X + b is asked for more than its own old output where that is added to other values, as in a residual
connection: for  Y = S0 - (S - W X - b)  with the sum S0 of the uncompressed model and the sum S of now. What the blocks
before it and the other branch have lost is then made good too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, check_finite, find_blocks
from deploytool.compress.calls import Call, Reached, leaves, replay
from deploytool.compress.matrices import geometry, gram, matrix, output_rows, rows
from deploytool.compress.prune.refit import Reading
from deploytool.compress.prune.weighing import Weighing
from deploytool.errors import UsageProblem

_PARTS = 4  # one of so many calls is held out
NOTHING: Mapping[str, Any] = MappingProxyType({})
_ROUNDING = 1e-12  # of the sum of squares: what subtracting the mean leaves of equal rows
_SAME = 1e-3  # of the largest disturbance: how exactly it must come back


@dataclass
class _Seen:
    """One run of a block: what the layers read and gave, by name, and what arrived at places after that."""

    read: dict[str, Tensor] = field(default_factory=dict)
    gave: dict[str, Tensor] = field(default_factory=dict)
    later: dict[str, Tensor] = field(default_factory=dict)


@dataclass
class _Sums:
    """X^T X [in, in] and Y^T X [out, in], float64, of rows X and what is wanted for them Y."""

    gram: Tensor
    wanted: Tensor

    @classmethod
    def zero(cls, weight: Tensor) -> Self:
        """For a weight [out, in]."""
        return cls(weight.new_zeros(weight.shape[1], weight.shape[1]), torch.zeros_like(weight))

    def add(self, square: Tensor, product: Tensor) -> None:
        """Only as many columns as there are here: the last one is there for the bias."""
        size = len(self.gram)
        self.gram += square[:size, :size]
        self.wanted += product[:, :size]


def home(module: nn.Module, names: list[str]) -> str | None:
    """The repeated block that holds all the named layers, or None."""
    return next((b for b in find_blocks(module) if all(n == b or n.startswith(f"{b}.") for n in names)), None)


def read(
    before: Block, now: Block, layers: dict[str, list[Tensor]], *, whole: bool, left: Mapping[str, Tensor] = NOTHING,
    weighing: Mapping[str, Weighing] = NOTHING,
) -> list[Reading]:  # fmt: skip
    """The readings of the named layers, given with the columns of their units, over all calls of the uncompressed
    block and of the block now.

    whole      of one layer: aim at the sum that its output is added to, where there is one, and not at the output alone
    left       the outputs [out] of a layer that other removals have left, where these are not all
    weighing   how much errors matter, by layer, where not alike

    Raises UsageProblem where errors are weighed, and a sample reaches the block not at all or more than once.
    """
    if any(len(weighing[name].rows) != len(now.calls) for name in layers if name in weighing):
        raise UsageProblem("DT204", f"errors can be weighed by outputs only where each sample reaches {now.name} once "
                           f"(got {len(now.calls)} calls)", fix='set weigh = "alike"')  # fmt: skip
    weights = {name: _with_bias(before.layers[name]) for name in layers}
    weights = {name: weight[left[name]] if name in left else weight for name, weight in weights.items()}
    total, held = ({name: _Sums.zero(weight) for name, weight in weights.items()} for _ in range(2))
    place = find_sum(before, next(iter(layers))) if whole and len(layers) == 1 and not left else None
    weighed = {name: _Weighed(weighing.get(name), left.get(name)) for name in layers}
    spread = _Spread()
    for index, (old, new) in enumerate(zip(before.calls, now.calls, strict=True)):
        was, seen = _look(before, layers, old, place), _look(now, layers, new, place)
        if place is not None:
            first = next(iter(layers))
            spread.add(*weighed[first].errors(index, output_rows(now.layers[first], was.later[place])))
        for name, square, product in _products(index, was, seen, now.layers, place, left, weighed):
            for sums in (total, held)[: 2 if index % _PARTS == _PARTS - 1 else 1]:
                sums[name].add(square, product)
    check_finite({name: torch.cat([sums.gram, sums.wanted]) for name, sums in total.items()})
    return [
        Reading(weight, total[name].gram, total[name].wanted, layers[name],
                (held[name].gram, held[name].wanted) if len(now.calls) >= _PARTS else None,
                None if place is None else spread.total, weighed[name].root)
        for name, weight in weights.items()
    ]  # fmt: skip


def _products(
    index: int, was: _Seen, seen: _Seen, layers: Mapping[str, nn.Module], place: str | None,
    left: Mapping[str, Tensor], weighed: Mapping[str, _Weighed],
) -> Iterator[tuple[str, Tensor, Tensor]]:  # fmt: skip
    """X^T X and Y^T X of every layer, float64, with a column of ones in X; the first one once for layers that read the
    same tensor."""
    grams: dict[Any, Tensor] = {}
    for name, read_now in seen.read.items():
        x = rows(layers[name], read_now)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        scale = weighed[name].scale(index)
        x = x if scale is None else x * scale
        key = (id(read_now), *geometry(layers[name]), None if scale is None else name)
        if key not in grams:
            grams[key] = gram(x).double()
        wanted = was.gave[name] if place is None else was.later[place] - (seen.later[place] - seen.gave[name])
        y = output_rows(layers[name], wanted)
        y = y[:, left[name]] if name in left else y
        y = y if scale is None else y * scale
        yield name, grams[key], (y.T @ x).double()


def _with_bias(layer: nn.Module) -> Tensor:
    """[out, in], float64, with the bias as a last column where there is one."""
    weight, bias = matrix(layer).double(), layer.bias
    return torch.cat([weight, bias.detach().double()[:, None]], dim=1) if isinstance(bias, Tensor) else weight


def find_sum(block: Block, name: str) -> str | None:
    """Where the output of a layer arrives with something added: the name of the module in the block that reads the sum,
    "" for the block's own output; None where it arrives nowhere unchanged. Seen by disturbing it in the first call."""
    clean = _look(block, [name], block.calls[0], None, everywhere=True)
    gave = clean.gave[name]
    noise = torch.randn(gave.shape, generator=torch.Generator().manual_seed(0)) * (float(gave.std()) + 1e-6)
    noise = noise.to(gave.dtype)
    later = _look(block, [name], block.calls[0], None, everywhere=True, added=noise).later
    close = _SAME * float(noise.abs().max())
    found = [place for place, value in clean.later.items()
             if place in later and float((later[place] - value - noise).abs().max()) <= close]  # fmt: skip
    return found[-1] if found else None


class _Weighed:
    """How much one layer's errors matter; alike where nothing is known. `left` are the outputs that removals left."""

    def __init__(self, weighing: Weighing | None, left: Tensor | None):
        self._weighing = weighing
        root = None if weighing is None else weighing.root
        self.root = root if root is None or left is None else root[left]

    def scale(self, index: int) -> Tensor | None:
        """Square roots [n, 1] of the weights of the rows of one call."""
        return None if self._weighing is None else self._weighing.rows[index].sqrt()[:, None]

    def errors(self, index: int, values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of one call in which the square of every entry counts alike, and the weights of the rows [n, 1]."""
        if self._weighing is None:
            return values, None
        return values.double() @ self._weighing.root, self._weighing.rows[index][:, None]


class _Spread:
    """The sum of squares of rows about their mean; 0 where they differ by rounding only."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0.0, torch.zeros((), dtype=torch.float64), 0.0

    def add(self, values: Tensor, weights: Tensor | None = None) -> None:
        """Rows [n, out] and their weights [n, 1], 1 where left out."""
        weights = torch.ones(len(values), 1) if weights is None else weights
        self.count += float(weights.sum())
        self.first = self.first + (weights * values.double()).sum(dim=0)
        self.second += float((weights * values.double().square()).sum())

    @property
    def total(self) -> float:
        total = self.second - float(self.first.square().sum()) / self.count
        return total if total > _ROUNDING * self.second else 0.0


def _look(
    block: Block, layers: Iterable[str], call: Call, place: str | None, *, everywhere: bool = False,
    added: Tensor | None = None,
) -> _Seen:  # fmt: skip
    """One call of the block, which ends when the layers have run and the place is reached; with `added` to outputs."""
    seen, names = _Seen(), list(layers)
    copies: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # of inputs, held so that no identity is used twice

    def gave(name: str, _: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen.read[name] = _once(copies, args[0])
        seen.gave[name] = output.clone()
        if place is None and not everywhere and len(seen.gave) == len(names):
            raise Reached
        return output if added is None else output + added

    def arrived(where: str, value: Any) -> None:
        last = seen.gave.get(names[-1])
        if last is None or not isinstance(value, Tensor) or value.shape != last.shape or where in seen.later:
            return
        seen.later[where] = value.clone()
        if not everywhere and where:
            raise Reached

    places = [n for n, _ in block.module.named_modules()] if everywhere else [place]
    handles = [block.module.get_submodule(where).register_forward_pre_hook(
        lambda _, args, where=where: arrived(where, args[0] if args else None))
        for where in places if where]  # fmt: skip
    handles += [block.layers[name].register_forward_hook(partial(gave, name)) for name in names]
    try:
        for leaf in leaves(replay(block.module, call)):
            arrived("", leaf)
    except Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _once(copies: dict[tuple[int, int], tuple[Tensor, Tensor]], value: Tensor) -> Tensor:
    """A copy of the value as it is now, the same for all layers that read it so."""
    key = (id(value), value._version)
    if key not in copies:
        copies[key] = (value, value.clone())
    return copies[key][1]

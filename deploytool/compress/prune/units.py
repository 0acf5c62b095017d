"""What can be removed from a model: units, each a set of output and input channels that only make sense together.

A neuron is a row of the layer before and a column of the layer after; a head is its rows of query, key and value and
its columns of the projection; channels joined by a residual connection belong together in all layers that write or
read it. This is the dependency graph of Fang et al., "DepGraph: towards any structural pruning", CVPR 2023, found by
`influence` instead of by rules for operators.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from deploytool.compress.prune.influence import Probe, Touched

_Node = tuple[str, str, int]  # (layer, "out" or "in", channel)


@dataclass
class Group:
    """Layers that share units. For every unit its channels: {layer: int64 indices}.

    outputs   of the layers that make it; inputs: of the layers that read it, batch normalizations included
    """

    outputs: list[dict[str, list[int]]] = field(default_factory=list)
    inputs: list[dict[str, list[int]]] = field(default_factory=list)

    @property
    def makers(self) -> list[str]:
        """Names of the layers that make the units, in order."""
        return list(dict.fromkeys(name for unit in self.outputs for name in unit))

    @property
    def readers(self) -> list[str]:
        """Names of the layers that read the units, in order."""
        return list(dict.fromkeys(name for unit in self.inputs for name in unit))

    def __len__(self) -> int:
        return len(self.outputs)


class _Union:
    """Sets that grow together (disjoint-set forest)."""

    def __init__(self) -> None:
        self.parent: dict[_Node, _Node] = {}

    def root(self, node: _Node) -> _Node:
        self.parent.setdefault(node, node)
        while self.parent[node] != node:
            self.parent[node] = self.parent[self.parent[node]]
            node = self.parent[node]
        return node

    def join(self, nodes: Iterable[_Node]) -> None:
        first, *others = nodes
        for other in others:
            self.parent[self.root(other)] = self.root(first)


def find_groups(probe: Probe, layers: dict[str, int], shrinkable: set[str]) -> tuple[list[Group], dict[str, str]]:
    """The groups that the layers {name: output channels} make, and why the others make none.

    `shrinkable` are the names of the modules that can lose input channels.
    """
    union, why = _Union(), {}
    for name, channels in layers.items():
        reason = _why_not(probe, name, channels, shrinkable)
        if reason:
            why[name] = reason
            continue
        for part, reached in _pieces(probe, name, torch.arange(channels)):
            nodes = [(name, "out", c) for c in part.tolist()]
            union.join(nodes + [(n, "in", c) for n, t in reached.items() for c in t.nonzero().flatten().tolist()])
    return _groups(union, why), why


def _why_not(probe: Probe, name: str, channels: int, shrinkable: set[str]) -> str | None:
    if name not in probe.barriers:
        return "it did not run on the sample"
    if name in probe.repeated:
        return "it runs several times"
    reached, leaves_it = probe.touched(name, torch.arange(channels))
    if leaves_it:
        return "its channels are part of the outputs"
    fixed = [n for n in reached if n not in shrinkable]
    if fixed:
        return f"{fixed[0]} needs all of its channels"
    if not reached:
        return "nothing reads its channels"
    return next((f"{n} runs several times" for n in reached if n in probe.repeated), None)


def _pieces(probe: Probe, name: str, channels: Tensor) -> list[tuple[Tensor, Touched]]:
    """Sets of channels with what they reach: single channels where each input has one source, else as small as seen."""
    single = _one_source_each(probe, name, channels)
    return single if single is not None else _split(probe, name, channels, probe.touched(name, channels)[0])


def _one_source_each(probe: Probe, name: str, channels: Tensor) -> list[tuple[Tensor, Touched]] | None:
    """Every channel with what it reaches, by binary codes: 2 log2(n) runs; None where an input has several sources."""
    whole, _ = probe.touched(name, channels)
    codes = {n: torch.zeros(len(t), dtype=torch.int64) for n, t in whole.items()}
    for bit in range(max(1, (len(channels) - 1).bit_length())):
        high = (channels >> bit) & 1 == 1
        sides = [probe.touched(name, channels[side])[0] if bool(side.any()) else {} for side in (~high, high)]
        for n, t in whole.items():
            low_side, high_side = (side.get(n, torch.zeros_like(t)) for side in sides)
            if bool((low_side & high_side).any()) or not torch.equal(low_side | high_side, t):
                return None
            codes[n] += high_side.long() << bit
    return [(c[None], {n: t & (codes[n] == c) for n, t in whole.items()}) for c in channels]


def _split(probe: Probe, name: str, channels: Tensor, reached: Touched) -> list[tuple[Tensor, Touched]]:
    """Halves, until both halves reach all that the whole does: such channels are taken as inseparable."""
    if len(channels) == 1:
        return [(channels, reached)]
    halves = [channels[: len(channels) // 2], channels[len(channels) // 2 :]]
    parts = [probe.touched(name, half)[0] for half in halves]
    if all(_equal(part, reached) for part in parts):
        return [(channels, reached)]
    return [piece for half, part in zip(halves, parts, strict=True) for piece in _split(probe, name, half, part)]


def _equal(a: Touched, b: Touched) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def _groups(union: _Union, why: dict[str, str]) -> list[Group]:
    """Connected channels are a unit; units that share a layer are a group."""
    units: dict[_Node, list[_Node]] = {}
    for node in union.parent:
        units.setdefault(union.root(node), []).append(node)
    layers = _Union()
    for unit in units.values():
        layers.join((n, s, -1) for n, s in dict.fromkeys((n, s) for n, s, _ in unit))
    groups: dict[_Node, Group] = {}
    for unit in units.values():
        group = groups.setdefault(layers.root((unit[0][0], unit[0][1], -1)), Group())
        for side, store in (("out", group.outputs), ("in", group.inputs)):
            held: dict[str, list[int]] = {}
            for n, s, channel in sorted(unit):
                if s == side:
                    held.setdefault(n, []).append(channel)
            store.append(held)
    found = []
    for group in groups.values():
        if len(group) > 1:
            found.append(_ordered(group))
        else:
            why.update(dict.fromkeys(group.makers, "all of its channels hang together"))
    return found


def _ordered(group: Group) -> Group:
    """The units by the first channel of the first reader: heads and neurons in their own order."""
    first = group.readers[0]
    order = sorted(range(len(group)), key=lambda i: group.inputs[i].get(first, [-1])[0])
    return Group([group.outputs[i] for i in order], [group.inputs[i] for i in order])

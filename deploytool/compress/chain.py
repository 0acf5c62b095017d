"""How blocks follow one another: which of a block's arguments the block before it gave.

Learnt by running the model once and comparing objects, then proved: the blocks, called one after the other by what was
learnt, must give what the model itself gave. Where they do not, a block's arguments come from a run of the whole model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.calls import Call, leaves, plain_forward, record_calls, refill, replay
from deploytool.compress.shelf import Shelf
from deploytool.errors import InputRefused
from deploytool.load.memory import drop_pages

_CONSTANTS = (bool, str, type(None), torch.dtype)


@dataclass(frozen=True)
class _Take:
    """A leaf of the next call: number `index` of the leaves of the "output" or the "input" of the block before."""

    place: str
    index: int


@dataclass(frozen=True)
class Link:
    """How a block's calls come about. `before` is None where only a run of the model tells; `once`: one call a run."""

    once: bool
    before: str | None = None
    template: Any = None
    inputs: int = 0


@dataclass
class _Seen:
    name: str
    call: Call
    outputs: list[Any] = field(default_factory=list)
    result: list[Any] = field(default_factory=list)


def trace(
    run: Callable[[], object], blocks: Mapping[str, nn.Module], root: nn.Module | None = None
) -> list[tuple[str, Link]]:
    """The blocks that ran, in the order of their first call, with their links; raises InputRefused when none did.

    `root` is the model: its linear layers that run after the blocks are then not computed, unless what follows fails
    without them.
    """
    try:
        seen = _watch(run, blocks, root)
    except Exception:  # such as that of an activation which writes into what a layer gave
        seen = _watch(run, blocks, None)
    if not seen:
        raise InputRefused("DT303", "calibration samples must reach the chosen layers (none of them ran)",
                           detail=[f"not run: {name or 'the model'}" for name in blocks])  # fmt: skip
    names = [entry.name for entry in seen]
    order = []
    for index, entry in enumerate(seen):
        if entry.name in names[:index]:
            continue
        link = Link(once=names.count(entry.name) == 1)
        if link.once and index and names.count(seen[index - 1].name) == 1:
            link = _link(seen[index - 1], entry) or link
        order.append((entry.name, link))
    return _proved(run, blocks, order, {entry.name: entry for entry in seen})


def follow(
    root: nn.Module, link: Link, calls: Sequence[Call], given: Iterable[Any] | None = None
) -> Shelf[Call] | None:
    """The next block's calls, from those of the block before; None where they must be recorded.

    `given` is what the block before gives for these calls, where that is known.
    """
    if link.before is None or not calls:
        return None
    block = root.get_submodule(link.before)
    outputs = (replay(block, call) for call in calls) if given is None else given
    made: Shelf[Call] = Shelf(expected=len(calls))
    for call, output in zip(calls, outputs, strict=True):
        if len(leaves(call)) != link.inputs:
            return None
        made.append(_next(link, call, output))
    return made


def _next(link: Link, call: Call, outputs: Any) -> Call:
    held = {"output": leaves(outputs), "input": leaves(call)}
    new = (held[leaf.place][leaf.index] if isinstance(leaf, _Take) else leaf for leaf in leaves(link.template))
    filled: Call = refill(link.template, new)
    return filled


def _watch(run: Callable[[], object], blocks: Mapping[str, nn.Module], root: nn.Module | None) -> list[_Seen]:
    """Every call of the blocks in one run; all objects are held, so that no identity is used twice."""
    seen: list[_Seen] = []
    inside = {id(part) for block in blocks.values() for part in block.modules()}
    heads = [] if root is None else [m for m in root.modules() if type(m) is nn.Linear and id(m) not in inside
                                        and "forward" not in m.__dict__]  # fmt: skip
    waiting = set(blocks)

    def before(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(_Seen(name, (args, kwargs)))

    def after(name: str, output: Any) -> None:
        mine = next(entry for entry in reversed(seen) if entry.name == name and not entry.outputs)
        mine.outputs = leaves(output)
        mine.result = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in mine.outputs]
        drop_pages(blocks[name].parameters())  # else the whole model is in memory at the end
        waiting.discard(name)
        if not waiting:  # what follows is run for nothing but the calls of blocks that may come again
            for head in heads:
                head.forward = partial(_nothing, head)  # type: ignore[method-assign]

    handles = []
    for name, block in blocks.items():
        handles += [
            block.register_forward_pre_hook(lambda m, a, k, n=name: before(n, a, k), with_kwargs=True),
            block.register_forward_hook(lambda m, a, o, n=name: after(n, o)),
        ]
    try:
        with plain_forward():
            run()
    finally:
        for handle in handles:
            handle.remove()
        for head in heads:
            head.__dict__.pop("forward", None)
    return seen


def _nothing(layer: nn.Linear, x: Tensor) -> Tensor:
    """Zeros of the shape that the layer gives, one of them in memory: a vocabulary's logits are larger than a block."""
    return x.new_zeros(()).expand(*x.shape[:-1], layer.out_features)


def _link(one: _Seen, two: _Seen) -> Link | None:
    """How `two` was called with what `one` was called with and gave; None when something came from elsewhere."""
    inputs, taken = leaves(one.call), []
    for position, leaf in enumerate(leaves(two.call)):
        origin = _find(leaf, position, inputs, one.outputs)
        if origin is None and not isinstance(leaf, _CONSTANTS):
            return None
        taken.append(leaf if origin is None else origin)
    if not any(isinstance(t, _Take) and t.place == "output" for t in taken):
        return None
    return Link(True, one.name, refill(two.call, iter(taken)), len(inputs))


def _find(leaf: Any, position: int, inputs: list[Any], outputs: list[Any]) -> _Take | None:
    if isinstance(leaf, Tensor):
        for index, output in enumerate(outputs):
            if output is leaf:
                return _Take("output", index)
    if position < len(inputs) and inputs[position] is leaf:  # the same place first: a mask may be None in this sample
        return _Take("input", position)
    if isinstance(leaf, _CONSTANTS):
        return None
    return next((_Take("input", i) for i, value in enumerate(inputs) if value is leaf), None)


def _proved(
    run: Callable[[], object], blocks: Mapping[str, nn.Module], order: list[tuple[str, Link]], seen: dict[str, _Seen]
) -> list[tuple[str, Link]]:
    """The order with its links, or without any of a chain whose calls do not give what the model gave."""
    proved: list[tuple[str, Link]] = []
    start = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and order[end][1].before is not None:
            continue
        part = order[start:end]
        good = len(part) == 1 or _gives(run, blocks, part, seen[part[-1][0]].result)
        proved += part if good else [(name, replace(link, before=None)) for name, link in part]
        start = end
    return proved


def _gives(
    run: Callable[[], object], blocks: Mapping[str, nn.Module], part: list[tuple[str, Link]], expected: list[Any]
) -> bool:
    call = record_calls(run, blocks[part[0][0]], first_only=True)[0]
    output = replay(blocks[part[0][0]], call)
    for name, link in part[1:]:
        call = _next(link, call, output)
        output = replay(blocks[name], call)
        drop_pages(blocks[name].parameters())
    pairs = list(zip(leaves(output), expected, strict=True))
    return all(_same(a, b) for a, b in pairs if isinstance(b, Tensor))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max().nan_to_num(1.0)) if b.numel() else 0.0)

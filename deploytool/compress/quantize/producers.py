"""What makes a linear layer's input: the norm or linear layer whose outputs may be scaled channel by channel for it.

Found by asking the model, not by names: scale a layer's output channels by numbers that are all different, and look
which channels of whose inputs grow by exactly these numbers. Then undo it at the readers: when the block's outputs are
as before, nothing else reads the channels, and the factors may move from the one layer's weights into the others'.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.calls import Call, leaves, replay

_NEAR = 1e-3  # of a channel: what may be left of it when its factor is taken out
SAME = 1e-4  # of the largest output: how far outputs of the same function may be apart in float32


@dataclass(frozen=True)
class Link:
    """`readers` all read one tensor; its channel i is channel `channels[i]` of `producer`'s output, times something
    that does not depend on the producer. Names are relative to the block.
    """

    producer: str
    readers: tuple[str, ...]
    channels: Tensor


@dataclass
class _Run:
    """One call of a block: outputs, linear layers by the tensor that they read, and the tensors."""

    outputs: list[Tensor]
    readers: dict[int, list[str]]
    inputs: dict[str, Tensor]
    order: list[str]


def find_links(block: nn.Module, call: Call) -> list[Link]:
    """The links inside a block, in the order in which the readers run; readers without a producer are in none."""
    base = _run(block, call)
    makers = [name for name in base.order if scalable(block.get_submodule(name)) is not None]
    open_ = {readers[0]: tuple(readers) for readers in base.readers.values()}
    found: dict[str, Link] = {}
    for name in reversed(makers):  # the nearest first
        waiting = [first for first in open_ if base.order.index(name) < base.order.index(first)]
        if not waiting:
            continue
        factors = _factors(scalable(block.get_submodule(name)) or 0)
        with _scaled({name: factors}, {}, block):
            scaled = _run(block, call)
        for first in waiting:
            channels = _channels(base.inputs[first], scaled.inputs[first], factors)
            if channels is None:
                continue
            link = Link(name, open_[first], channels)
            if _nothing_else_reads(block, call, base, link, factors):
                found[first] = link
                del open_[first]
    return [found[first] for first in base.order if first in found]


def scalable(layer: nn.Module) -> int | None:
    """How many output channels a layer has whose weights can take a factor each; None for other layers.

    Linear layers, and norms: layers whose parameters are all one number per channel.
    """
    if isinstance(layer, nn.Linear):
        return layer.out_features
    own = list(layer.parameters(recurse=False))
    if own and not list(layer.children()) and all(p.ndim == 1 and len(p) == len(own[0]) for p in own):
        return len(own[0])
    return None


def scale_outputs(layer: nn.Module, factors: Tensor, sample: Tensor | None = None) -> bool:
    """Multiply a layer's output channels by `factors` [n], through new parameters; the old tensors stay as they are.

    A norm's result is checked on `sample`; norms that multiply by 1 + weight are taken too. False where neither way
    gives the scaled outputs: then the layer is as before.
    """
    before = dict(layer.named_parameters(recurse=False))
    if isinstance(layer, nn.Linear):
        _assign(layer, {name: p * (factors[:, None] if p.ndim == 2 else factors) for name, p in before.items()})
        return True
    if sample is None:
        return False
    with torch.no_grad():
        wanted = layer(sample) * factors
        for offset in (0.0, 1.0):
            _assign(layer, {name: (p + offset * (name == "weight")) * factors - offset * (name == "weight")
                            for name, p in before.items()})  # fmt: skip
            if _same(layer(sample), wanted):
                return True
    _assign(layer, before)
    return False


def scale_inputs(layer: nn.Linear, factors: Tensor) -> None:
    """Multiply the columns of a linear layer's weight by `factors` [in], in a new parameter."""
    _assign(layer, {"weight": layer.weight * factors})


def first_input(block: nn.Module, name: str, call: Call) -> Tensor | None:
    """The tensor with which the call of a block first calls one of its layers."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...]) -> None:
        kept.extend(a.clone() for a in args[:1] if isinstance(a, Tensor) and not kept)

    handle = block.get_submodule(name).register_forward_pre_hook(keep)
    try:
        replay(block, call)
    finally:
        handle.remove()
    return kept[0] if kept else None


def outputs_of(block: nn.Module, call: Call) -> list[Tensor]:
    """The floating-point tensors that a block gives for a call."""
    return [leaf for leaf in leaves(replay(block, call)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def same_outputs(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of outputs are those of one function, up to float32's rounding."""
    return len(some) == len(others) and all(_same(a, b) for a, b in zip(some, others, strict=True))


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not bool(a.isfinite().all()):
        return False
    return a.numel() == 0 or bool((a - b).abs().max() <= SAME * b.abs().max())


def _assign(layer: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        setattr(layer, name, nn.Parameter(value.detach(), requires_grad=False))


def _factors(count: int) -> Tensor:
    """Numbers from 1.25 to 2.25, all different; neighbours are far apart, and 1 is none: it is what nothing changes."""
    return 1.25 + (torch.arange(count) * 0.6180339887498949) % 1.0


def _run(block: nn.Module, call: Call) -> _Run:
    run = _Run([], {}, {}, [])
    alive: list[Tensor] = []  # an identity is used twice only when its tensor is gone

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        run.order.append(name)
        if isinstance(layer, nn.Linear) and args:
            alive.append(args[0])
            run.readers.setdefault(id(args[0]), []).append(name)
            run.inputs[name] = args[0].clone()

    handles = [layer.register_forward_pre_hook(lambda m, a, n=name: look(n, m, a))
               for name, layer in block.named_modules() if name and not list(layer.children())]  # fmt: skip
    try:
        run.outputs = outputs_of(block, call)
    finally:
        for handle in handles:
            handle.remove()
    repeated = {name for name in run.order if run.order.count(name) > 1}
    run.order = [name for name in run.order if name not in repeated]  # a layer that is used twice is left alone
    run.readers = {key: names for key, names in run.readers.items() if not repeated & set(names)}
    return run


@contextmanager
def _scaled(outputs: dict[str, Tensor], inputs: dict[str, Tensor], block: nn.Module) -> Iterator[None]:
    """While it lasts, layers' outputs and other layers' inputs are multiplied channel by channel."""
    handles = [block.get_submodule(n).register_forward_hook(lambda m, a, o, f=f: o * f)
               for n, f in outputs.items()]  # fmt: skip
    handles += [block.get_submodule(n).register_forward_pre_hook(lambda m, a, f=f: (a[0] * f, *a[1:]))
                for n, f in inputs.items()]  # fmt: skip
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _channels(before: Tensor, after: Tensor, factors: Tensor) -> Tensor | None:
    """For every channel of a tensor the factor, by number, by which it grew; None unless each grew by one exactly."""
    if before.shape != after.shape:
        return None
    old, new = (t.reshape(-1, t.shape[-1]).double() for t in (before, after))
    power = old.square().sum(0)
    live = power > 0
    ratio = (old * new).sum(0) / power.masked_fill(~live, 1.0)
    left = (new - ratio * old).square().sum(0) / power.masked_fill(~live, 1.0)
    ordered, index = factors.double().sort()
    place = torch.searchsorted(ordered, ratio).clamp(max=len(ordered) - 1)
    below = (place - 1).clamp(min=0)
    nearest = torch.where((ratio - ordered[below]).abs() < (ratio - ordered[place]).abs(), below, place)
    gap = float(ordered.diff().min()) if len(ordered) > 1 else 1.0
    hit = ((ratio - ordered[nearest]).abs() < gap / 4) & (left < _NEAR**2)
    if not bool(live.any()) or not bool(hit[live].all()):
        return None
    channels = index[nearest]
    if not bool(live.all()):  # what was always zero says nothing: it is told by the others when all stand in order
        whole = torch.arange(len(channels))
        return whole if len(channels) == len(factors) and torch.equal(channels[live], whole[live]) else None
    return channels


def _nothing_else_reads(block: nn.Module, call: Call, base: _Run, link: Link, factors: Tensor) -> bool:
    undo = 1.0 / factors[link.channels]
    with _scaled({link.producer: factors}, dict.fromkeys(link.readers, undo), block):
        return same_outputs(outputs_of(block, call), base.outputs)

"""Calibration block by block: one block of the model at a time sees all samples, is changed, and feeds the next.

    for block in walk_blocks(source, chosen, samples):
        totals = block.accumulate(gram)             # {layer: Total}; one Total for layers that read the same tensor
        ...                                         # change the block's weights in place
                                                    # the next block gets what the changed one gives

Memory stays at the weights and the activations of one sample: what reaches one block of all the others lies on disk
(`shelf`). Weights that lie in a mapped file are held while their block is met. A block is a child of a list of modules
of one type, found by structure; a layer outside all such lists is a block of its own.

The scheme is that of Frantar and Alistarh, "SparseGPT", ICML 2023, section 4 (and of GPTQ before it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.calls import Call, Reached, leaves, plain_forward, record_calls, replay, sharing_equal
from deploytool.compress.chain import follow, trace
from deploytool.compress.matrices import Measure, geometry, gram, rows
from deploytool.compress.shelf import Shelf
from deploytool.errors import InputRefused
from deploytool.load.memory import drop_pages
from deploytool.source import Source

Sample = dict[str, Tensor]


@dataclass
class Total:
    """The sum of a measure over all rows that a layer saw, float64, and how many rows there were."""

    sum: Tensor
    rows: int


@dataclass(frozen=True)
class Stage:
    """Layers of a block that read the same tensor. `once`: each runs once in a call, which may end after the last."""

    layers: tuple[str, ...]
    once: bool


@dataclass
class Block:
    """One block and what reaches it.

    name     dotted, as in the source's module; "" is the whole model
    module   the block itself: change its weights in place
    layers   {dotted name: layer} of the chosen layers in it
    calls    the arguments of every call, all samples, as the changed blocks before it give them; read one at a time
    given    what the changed block gives for every call, where somebody has found out (`turns.Turns`)
    """

    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    calls: Sequence[Call] = field(repr=False)
    given: Iterable[Any] | None = field(default=None, repr=False)

    def outputs(self) -> Iterator[Any]:
        """What the block gives for every call, as it is now."""
        return (replay(self.module, call) for call in self.calls)

    def largest(self) -> Call:
        """The call with the most elements, the first of several: what is long may be taken in parts."""
        return max(self.calls, key=lambda call: sum(x.numel() for x in leaves(call) if isinstance(x, Tensor)))

    def stages(self) -> list[Stage]:
        """The layers in the order in which the largest call reads; those that it does not reach stand together last.

        Whoever changes the layers of one stage before looking at the next sees what the changed ones give.
        """
        reads: dict[str, list[int]] = {}
        for index, (names, _) in enumerate(_shared_rows(self.module, self.largest(), self.layers)):
            for name in names:
                reads.setdefault(name, []).append(index)
        alike: dict[tuple[int, ...], list[str]] = {}
        for name, tensors in reads.items():
            alike.setdefault(tuple(tensors), []).append(name)
        once = all(len(tensors) == 1 for tensors in alike)
        rest = tuple(name for name in self.layers if name not in reads)
        return [Stage(tuple(names), once) for names in alike.values()] + ([Stage(rest, False)] if rest else [])

    def accumulate(
        self, measure: Measure, layers: Iterable[str] | None = None, *, once: bool = False
    ) -> dict[str, Total]:
        """{layer: Total of `measure` over the rows that it reads}, for all layers of the block or some.

        `measure` maps rows [n, in] to a tensor whose size does not depend on n (`matrices.gram`, `matrices.squares`).
        It is taken once for layers that read the same tensor, and they get the same Total object. Each call's value is
        computed in the rows' own type and added in float64. Layers that never ran are left out. Raises InputRefused
        when a sum is not finite. `once` says that each layer runs once in a call, whose rest is then spared.
        """
        watched = {name: self.layers[name] for name in (self.layers if layers is None else layers)}
        parts: dict[tuple[str, ...], Total] = {}
        for call in self.calls:
            for names, x in _shared_rows(self.module, call, watched, once=once):
                value = measure(x)
                part = parts.setdefault(names, Total(torch.zeros_like(value, dtype=torch.float64), 0))
                part.sum += value
                part.rows += len(x)
        totals = _per_layer(parts, watched)
        check_finite({name: total.sum for name, total in totals.items()})
        return totals


@dataclass
class Moments:
    """G = X^T X and C = X0^T X, float64, of the rows X that a layer reads now and X0 that it read before."""

    gram: Tensor
    cross: Tensor
    rows: int


def paired_moments(
    before: Block, now: Block, layers: Iterable[str], *, ones: bool = False, once: bool = False
) -> dict[str, Moments]:
    """{layer: Moments} of two like blocks, each fed in its own way; one object for layers that read the same tensor.

    With `ones` the rows get a last column of ones, for the bias; `once` is that of `Block.accumulate`. Raises
    InputRefused when a sum is not finite.
    """
    names = list(layers)
    parts: dict[tuple[str, ...], Moments] = {}
    for old, new in zip(before.calls, now.calls, strict=True):
        pairs = zip(_shared_rows(before.module, old, {n: before.layers[n] for n in names}, once=once),
                    _shared_rows(now.module, new, {n: now.layers[n] for n in names}, once=once),
                    strict=True)  # fmt: skip
        for (_, x0), (readers, x) in pairs:
            if ones:
                x0, x = (torch.cat([t, t.new_ones(len(t), 1)], dim=1) for t in (x0, x))
            if readers not in parts:
                zero = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
                parts[readers] = Moments(zero, zero.clone(), 0)
            part = parts[readers]
            part.gram += gram(x)
            part.cross += x0.T @ x
            part.rows += len(x)
    check_finite({name: part.cross + part.gram for readers, part in parts.items() for name in readers})
    read = {name: [part for readers, part in parts.items() if name in readers] for name in names}
    return {name: _joined(mine) for name, mine in read.items() if mine}


def _joined(parts: list[Moments]) -> Moments:
    """One for all; a layer may read together with others in some calls and alone in others."""
    if len(parts) == 1:
        return parts[0]
    gram = torch.stack([part.gram for part in parts]).sum(dim=0)
    cross = torch.stack([part.cross for part in parts]).sum(dim=0)
    return Moments(gram, cross, sum(part.rows for part in parts))


def check_finite(sums: dict[str, Tensor]) -> None:
    """Raise InputRefused DT303 where the sum of a layer, by its name, is not finite."""
    bad = [name for name, total in sums.items() if not bool(torch.isfinite(total).all())]
    if bad:
        raise InputRefused("DT303", "calibration samples must give finite activations (got NaN or infinity at "
                           f"{bad[0]})", fix="check samples() for NaN, and the model for overflow")  # fmt: skip


def walk_blocks(source: Source, layers: Iterable[str], samples: Sequence[Sample]) -> Iterator[Block]:
    """The blocks that hold the named layers, in the order in which they run.

    The source is a copy of the caller's, who changes its module in place: every block is yielded with what reaches it
    from the blocks before it, as they were left. Raises InputRefused when there are no samples, when one holds NaN or
    infinity, or when none of the layers' blocks runs on the first.
    """
    check_samples(samples)
    module = source.module
    wanted = _by_block(module, list(layers))
    order = trace(_run(source, samples[0]), {name: module.get_submodule(name) for name in wanted}, module)
    drop_pages(module.parameters())
    calls: Shelf[Call] = Shelf()
    given: Iterable[Any] | None = None
    for name, link in order:
        following = follow(module, link, calls, given)
        if following is None:
            calls, given = Shelf(), None  # what is held is dropped before the new is made
            following = _calls_of(source, samples, module.get_submodule(name), first_only=link.once)
        calls, given = following, None
        held = {layer: module.get_submodule(layer) for layer in wanted[name]}
        block = Block(name, module.get_submodule(name), held, calls)
        yield block
        given, block.given = block.given, None


def find_blocks(module: nn.Module) -> list[str]:
    """Names of the repeated blocks, outermost only, in the order of definition.

    Blocks are the children of a ModuleList or Sequential that has two or more, all of one type, with layers inside.
    """
    found: list[str] = []
    for name, part in module.named_modules():
        children = list(part.named_children())
        if not isinstance(part, (nn.ModuleList, nn.Sequential)) or len(children) < 2:
            continue
        if any(f"{name}.".startswith(f"{outer}.") for outer in found):
            continue
        if len({type(child) for _, child in children}) == 1 and all(list(child.children()) for _, child in children):
            found += [f"{name}.{child}".lstrip(".") for child, _ in children]
    return found


def _by_block(module: nn.Module, layers: list[str]) -> dict[str, list[str]]:
    """{block: its layers}; a layer in no repeated block is one itself, and without any block the whole model is one."""
    blocks = find_blocks(module)
    grouped: dict[str, list[str]] = {}
    for layer in layers:
        home = next((b for b in blocks if layer == b or layer.startswith(f"{b}.")), layer if blocks else "")
        grouped.setdefault(home, []).append(layer)
    return grouped


def _run(source: Source, sample: Sample) -> Callable[[], object]:
    return partial(source.flat, *(sample[name] for name in source.signature.input_names))


def _calls_of(source: Source, samples: Sequence[Sample], block: nn.Module, *, first_only: bool) -> Shelf[Call]:
    """What reaches the block in all runs; tensors that are equal in the first call are held once."""
    calls: Shelf[Call] = Shelf(expected=len(samples))
    for sample in samples:
        for call in record_calls(_run(source, sample), block, first_only=first_only):
            calls.append(sharing_equal(call, calls[0]) if calls else call)
    return calls


def _shared_rows(
    module: nn.Module, call: Call, layers: dict[str, nn.Module], *, once: bool = False, copied: bool = False
) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    """For one call every distinct tensor that the layers read, as rows, with the names of its readers."""
    seen: dict[tuple[object, ...], tuple[list[str], Tensor, Tensor]] = {}
    waiting = set(layers)

    def look(name: str, layer: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        kept = x.clone() if copied else x
        seen.setdefault((id(x), x._version, *geometry(layer)), ([], x, kept))[0].append(name)
        waiting.discard(name)
        if once and not waiting:
            raise Reached

    handles = [layer.register_forward_pre_hook(lambda m, args, n=name: look(n, m, args))
               for name, layer in layers.items()]  # fmt: skip
    try:
        with suppress(Reached):
            replay(module, call)
    finally:
        for handle in handles:
            handle.remove()
    if not copied and any(key[1] != x._version for key, (_, x, _) in seen.items()):
        # something wrote into a layer's input afterwards
        yield from _shared_rows(module, call, layers, once=once, copied=True)
        return
    for names, _, kept in seen.values():
        with plain_forward():
            x = rows(layers[names[0]], kept)
        yield tuple(names), x


def _per_layer(parts: dict[tuple[str, ...], Total], layers: Iterable[str]) -> dict[str, Total]:
    """One Total per layer; layers that read the same tensors in every call share it."""
    made: dict[tuple[tuple[str, ...], ...], Total] = {}
    totals = {}
    for layer in layers:
        keys = tuple(names for names in parts for name in names if name == layer)
        if not keys:
            continue
        if keys not in made:
            made[keys] = _total([parts[key] for key in keys])
        totals[layer] = made[keys]
    return totals


def _total(parts: list[Total]) -> Total:
    if len(parts) == 1:
        return parts[0]
    return Total(torch.stack([part.sum for part in parts]).sum(dim=0), sum(part.rows for part in parts))


def check_samples(samples: Sequence[Sample]) -> None:
    if not samples:
        raise InputRefused("DT303", "calibration needs at least one sample (got none)",
                           fix="let samples() of the model give some")  # fmt: skip
    for index, sample in enumerate(samples):
        bad = [name for name, value in sample.items()
               if value.is_floating_point() and not bool(torch.isfinite(value).all())]  # fmt: skip
        if bad:
            raise InputRefused("DT303", f"calibration samples must be finite (got NaN or infinity in {bad[0]!r} of "
                               f"sample {index})")  # fmt: skip

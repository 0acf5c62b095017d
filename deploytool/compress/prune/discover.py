"""The groups of removable units of a whole model, block by block where it has blocks, and what kind they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from deploytool.compress.blocks import find_blocks
from deploytool.compress.calls import plain_forward, record_calls, replay
from deploytool.compress.matrices import matrix
from deploytool.compress.prune.influence import watch
from deploytool.compress.prune.units import Group, find_groups
from deploytool.load.resize import RESIZABLE
from deploytool.source import Source

_ESCAPES = "its channels are part of the outputs"
_ENOUGH = 4  # elements: attention over one token shows nothing


def discover(source: Source, layers: dict[str, nn.Module], samples: Sequence[dict[str, Tensor]]) -> tuple[
    list[Group], dict[str, str]
]:  # fmt: skip
    """The groups that the matrix layers make, in the order of their makers, and why the others make none.

    Layers that run several times on any sample are in no group: the fit takes one run for all of a call. Blocks are
    looked at alone, which is fast; layers whose channels leave their block are looked at in the model.
    """
    module, run = source.module, partial(source.flat, *_example(source, samples))
    channels = {name: matrix(layer).shape[0] for name, layer in layers.items()}
    shrinkable = set(layers) | {n for n, m in module.named_modules() if isinstance(m, RESIZABLE) and n not in layers
                                and isinstance(m, nn.modules.batchnorm._BatchNorm)}  # fmt: skip
    groups: list[Group] = []
    why: dict[str, str] = {}
    for name in find_blocks(module):
        inside = {n: c for n, c in channels.items() if n == name or n.startswith(f"{name}.")}
        block = module.get_submodule(name)
        calls = record_calls(run, block, first_only=False) if inside else []
        if len(calls) == 1:
            probe = watch(partial(replay, block, calls[0]), block, set(layers), name)
            found, reasons = find_groups(probe, inside, shrinkable)
            groups += found
            why.update(reasons)
    settled = {n for group in groups for n in group.makers} | {n for n, r in why.items() if r != _ESCAPES}
    rest = {n: c for n, c in channels.items() if n not in settled}
    if rest:
        probe = watch(run, module, set(layers))
        found, reasons = find_groups(probe, rest, shrinkable)
        why = {n: r for n, r in why.items() if n not in rest} | reasons
        groups += found
    groups = _once(groups, _repeated(source, samples), why)
    return _disjoint(sorted(groups, key=lambda g: list(channels).index(g.makers[0])), why), why


def kind(source: Source, group: Group) -> str:
    """ "channels" of convolutions, "heads" where a unit is several rows of one layer, else "neurons"."""
    if any(isinstance(source.module.get_submodule(n), (nn.Conv1d, nn.Conv2d)) for n in group.makers):
        return "channels"
    return "heads" if any(len(rows) > 1 for rows in group.outputs[0].values()) else "neurons"


def _example(source: Source, samples: Sequence[dict[str, Tensor]]) -> list[Tensor]:
    """The smallest sample that is large enough for one position to look at another."""
    sizes = [max(t.numel() for n, t in s.items() if not n.startswith("past")) for s in samples]
    fit = [i for i, size in enumerate(sizes) if size >= _ENOUGH]
    best = samples[min(fit, key=lambda i: sizes[i]) if fit else sizes.index(max(sizes))]
    return [best[name] for name in source.signature.input_names]


def _repeated(source: Source, samples: Sequence[dict[str, Tensor]]) -> set[str]:
    """Names of the modules with weights that run more than once on some sample, as for a long text cut into parts."""
    named = {n: m for n, m in source.module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    runs: Counter[str] = Counter()
    repeated: set[str] = set()
    handles = [m.register_forward_pre_hook(lambda _, args, n=n: runs.update((n,))) for n, m in named.items()]
    try:
        for sample in samples:
            runs.clear()
            with plain_forward():
                source.flat(*(sample[name] for name in source.signature.input_names))
            repeated |= {name for name, count in runs.items() if count > 1}
    finally:
        for handle in handles:
            handle.remove()
    return repeated


def _once(groups: list[Group], repeated: set[str], why: dict[str, str]) -> list[Group]:
    """The groups without those that have a layer which runs several times."""
    kept = []
    for group in groups:
        often = [name for name in (*group.makers, *group.readers) if name in repeated]
        if often:
            why.update({n: "it runs several times" if n in repeated else f"{often[0]} runs several times"
                        for n in group.makers})  # fmt: skip
        else:
            kept.append(group)
    return kept


def _disjoint(groups: list[Group], why: dict[str, str]) -> list[Group]:
    """The groups without those that another one also writes to or reads from."""
    kept = []
    for group in groups:
        others = [g for g in groups if g is not group]
        clash = [n for g in others for n in {*g.makers} & {*group.makers} | {*g.readers} & {*group.readers}]
        if clash:
            why.update(dict.fromkeys(group.makers, f"{clash[0]} belongs to other units too"))
        else:
            kept.append(group)
    return kept

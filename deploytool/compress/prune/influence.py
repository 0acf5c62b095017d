"""Which inputs of which layers an output channel reaches, seen by disturbing it: no table of operators or of models.

A layer's chosen output channels are disturbed at random while every other layer gives its undisturbed output, so what
differs at a layer's input came there directly. Layers are told apart by type: matrices (linear, convolution), whose
channels can be removed, batch normalizations, which go along, and everything else with weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.calls import leaves, plain_forward

Touched = dict[str, Tensor]  # {layer: bool [input channels]}
_FAR = 3.0  # standard deviations of the disturbance
_SAME = 1e-6  # of the largest value: what counts as no difference


@dataclass(frozen=True)
class Probe:
    """A run of a model or block, and what it was like undisturbed.

    readers   {name: module}: every module whose input channels are watched
    barriers  names of the matrices, whose outputs are put back
    inputs    {name: input of the reader}; outputs likewise; result: tensors that the run gives
    """

    run: Callable[[], Any]
    readers: dict[str, nn.Module]
    barriers: frozenset[str]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    result: list[Tensor]
    repeated: frozenset[str]

    def touched(self, name: str, channels: Tensor) -> tuple[Touched, bool]:
        """{layer: its input channels that change} when outputs `channels` of layer `name` do; and whether the result
        of the run changes."""
        found: Touched = {}
        replaced, handles = [], []
        try:
            for other, module in self.readers.items():
                handles.append(module.register_forward_pre_hook(partial(self._look, other, found)))
                if other == name or other in self.barriers:  # computing what is thrown away would be most of the work
                    given = self._disturbed(name, channels) if other == name else self.outputs[other]
                    module.forward = partial(_give, given)
                    replaced.append(module)
            with plain_forward():
                result = _tensors(self.run())
        finally:
            for handle in handles:
                handle.remove()
            for module in replaced:
                del module.forward  # the class's own again
        pairs = zip(result, self.result, strict=True)
        return {n: t for n, t in found.items() if bool(t.any())}, any(bool(_changed(a, b).any()) for a, b in pairs)

    def _look(self, name: str, found: Touched, module: nn.Module, args: tuple[Any, ...]) -> None:
        axis = channel_axis(module, args[0])
        others = [d for d in range(args[0].ndim) if d != axis]
        found[name] = _changed(args[0], self.inputs[name]).sum(dim=others) > 0

    def _disturbed(self, name: str, channels: Tensor) -> Tensor:
        clean = self.outputs[name]
        axis = channel_axis(self.readers[name], clean)
        part = clean.index_select(axis, channels)
        noise = torch.randn(part.shape, generator=torch.Generator().manual_seed(len(channels)), dtype=part.dtype)
        return clean.index_copy(axis, channels, part + noise * (_FAR * float(clean.std()) + 1.0))


def watch(run: Callable[[], Any], module: nn.Module, matrices: set[str], prefix: str = "") -> Probe:
    """Run once and remember what every module with weights of its own reads and gives."""
    named = {f"{prefix}.{n}".strip("."): m for n, m in module.named_modules()}
    readers = {n: m for n, m in named.items() if next(m.parameters(recurse=False), None) is not None}
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    repeated: set[str] = set()

    def look(name: str, m: nn.Module, args: Any, output: Any) -> None:
        if name in inputs:
            repeated.add(name)
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            inputs[name], outputs[name] = args[0].clone(), output.clone()

    handles = [m.register_forward_hook(partial(look, n)) for n, m in readers.items()]
    try:
        with plain_forward():
            result = [t.clone() for t in _tensors(run())]
    finally:
        for handle in handles:
            handle.remove()
    seen = {n: m for n, m in readers.items() if n in inputs and inputs[n].is_floating_point()}
    return Probe(run, seen, frozenset(matrices & set(seen)), inputs, outputs, result, frozenset(repeated))


def channel_axis(module: nn.Module, tensor: Tensor) -> int:
    """Where the channels are: axis 1 for convolutions and batch normalization, the last one elsewhere."""
    kinds = (nn.Conv1d, nn.Conv2d, nn.modules.batchnorm._BatchNorm)
    return 1 if isinstance(module, kinds) and tensor.ndim > 1 else tensor.ndim - 1


def _give(output: Tensor, *args: Any) -> Tensor:
    return output.clone()


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _changed(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).abs() > _SAME * float(b.abs().max()) if b.numel() else torch.zeros_like(a, dtype=torch.bool)

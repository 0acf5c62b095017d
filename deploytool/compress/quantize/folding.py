"""Moves factors from what makes a tensor into the layers that read it, block by block; the function stays the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block
from deploytool.compress.quantize.producers import (
    Link,
    find_links,
    first_input,
    outputs_of,
    same_outputs,
    scale_inputs,
    scale_outputs,
)

_Shape = tuple[object, ...]


@dataclass
class Folder:
    """Finds links once per kind of block, and folds factors along them.

    `reasons` collects {"layer", "reason"} for readers that nothing could be folded for.
    """

    reasons: list[dict[str, str]] = field(default_factory=list)
    _known: dict[_Shape, list[Link]] = field(default_factory=dict, repr=False)

    def links(self, block: Block) -> list[Link]:
        """The links whose readers include a layer of the block, in the order in which the readers run."""
        shape = _shape(block.module)
        if shape not in self._known:
            self._known[shape] = find_links(block.module, block.calls[0]) if list(block.module.children()) else []
        chosen = {_relative(block, name) for name, layer in block.layers.items() if isinstance(layer, nn.Linear)}
        links = [link for link in self._known[shape] if chosen & set(link.readers)]
        linked = {name for link in links for name in link.readers}
        for name in block.layers:
            if _relative(block, name) not in linked:
                self.reasons.append({"layer": name, "reason": "no norm or linear layer alone makes its input"})
        return links

    def fold(self, block: Block, factors: Callable[[Link, list[str]], Tensor | None]) -> dict[str, Tensor]:
        """Fold the factors that `factors(link, chosen readers)` gives, [channels of the readers' input], or None.

        They must be equal for channels that one output of the producer makes. The block's outputs on its first call are
        compared before and after in float32: where they differ, nothing in the block is changed and the reason is told.
        Returns {chosen layer: factors that its inputs are now divided by}.
        """
        call = block.calls[0]
        expected = outputs_of(block.module, call)
        before = dict(block.module.named_parameters())
        done: dict[str, Tensor] = {}
        for link in self.links(block):
            readers = [name for name in block.layers if _relative(block, name) in link.readers]
            scale = factors(link, readers)
            if scale is None:
                continue
            if not _fold_one(block, link, scale):
                self.reasons += [{"layer": n, "reason": f"{link.producer} cannot take a factor"} for n in readers]
                continue
            done |= dict.fromkeys(readers, scale)
        if not done or same_outputs(outputs_of(block.module, call), expected):
            return done
        for name, parameter in before.items():
            owner, _, leaf = name.rpartition(".")
            setattr(block.module.get_submodule(owner), leaf, parameter)
        self.reasons += [{"layer": name, "reason": "the block's outputs would have changed"} for name in done]
        return {}


def per_class(values: Tensor, channels: Tensor) -> Tensor:
    """The root mean square of `values` [n] over all channels that one output makes, for each of them, [n]."""
    count = int(channels.max()) + 1
    total = torch.zeros(count, dtype=values.dtype).index_add_(0, channels, values.square())
    number = torch.zeros(count, dtype=values.dtype).index_add_(0, channels, torch.ones_like(values))
    return (total / number.clamp(min=1)).sqrt()[channels]


def _fold_one(block: Block, link: Link, scale: Tensor) -> bool:
    """Multiply the readers' columns by `scale` and divide the producer's outputs by it."""
    producer = block.module.get_submodule(link.producer)
    width = producer.out_features if isinstance(producer, nn.Linear) else len(next(producer.parameters()))
    divided = torch.ones(int(width))
    divided[link.channels] = 1.0 / scale
    sample = None if isinstance(producer, nn.Linear) else first_input(block.module, link.producer, block.calls[0])
    if not scale_outputs(producer, divided, sample):
        return False
    for name in link.readers:
        reader = block.module.get_submodule(name)
        assert isinstance(reader, nn.Linear)
        scale_inputs(reader, scale)
    return True


def _relative(block: Block, name: str) -> str:
    return name[len(block.name) :].lstrip(".")


def _shape(module: nn.Module) -> _Shape:
    """Equal for blocks that are built alike."""
    parts: Sequence[Any] = [(name, type(part)) for name, part in module.named_modules()]
    return (tuple(parts), tuple((name, tuple(p.shape)) for name, p in module.named_parameters()))

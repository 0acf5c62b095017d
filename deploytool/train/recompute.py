"""Gradient checkpointing: repeated blocks run again in the backward pass instead of keeping what is inside them.

Source: Chen et al., "Training deep nets with sublinear memory cost", 2016; torch.utils.checkpoint, not reentrant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from deploytool.errors import UsageProblem


def blocks(module: nn.Module) -> list[nn.Module]:
    """The repeated blocks: the items of the outermost lists of at least two modules that have parameters."""
    found: list[nn.Module] = []
    taken: set[int] = set()
    for name, child in module.named_modules():
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and name and id(child) not in taken:
            items = [item for item in child if next(item.parameters(), None) is not None]
            alike = len(items) > 1 and len({type(item) for item in items}) == 1
            if alike and next(items[0].children(), None) is not None:
                found += items
                taken |= {id(inner) for item in items for inner in item.modules()}
    return found


@contextmanager
def recomputed(module: nn.Module) -> Iterator[int]:
    """Within the block, what the repeated blocks compute inside is not kept; gives how many there are."""
    chosen = blocks(module)
    if not chosen:
        raise UsageProblem("DT204", "gradient_checkpointing needs a model with repeated blocks (got none)",
                           fix="leave gradient_checkpointing out")  # fmt: skip
    for block in chosen:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield len(chosen)
    finally:
        for block in chosen:
            del block.forward

"""The batches of training, grouped by optimizer step and cut into the parts of the processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from deploytool.errors import InputRefused
from deploytool.train.randomness import drawn

Batch = Mapping[str, Tensor]
Batches = Callable[[int], Iterable[Batch]]
IGNORED = -100  # the label that torch's cross-entropy leaves out
_LABELS = ("target", "labels")
_FRESH = "let train_batches() give a fresh iterable at every call"


def items(batch: Batch) -> float:
    """What a mean loss is a mean over: labels that count where there are integer ones, else rows of the batch."""
    for name in _LABELS:
        if name in batch and not batch[name].is_floating_point():
            return float((batch[name] != IGNORED).sum())
    return float(max((t.shape[0] for t in batch.values() if isinstance(t, Tensor) and t.ndim), default=1))


@dataclass(frozen=True)
class Step:
    """The batches of one optimizer step, `index` the number of the step in its epoch."""

    epoch: int
    index: int
    last: bool
    batches: tuple[Batch, ...]


def steps_per_epoch(batches: Batches, group: int, seed: int, seen: Callable[[Batch], None] | None = None) -> int:
    """Optimizer steps of one pass; raises InputRefused when there are no batches. `seen` gets every batch."""
    each = 0
    for batch in drawn(lambda: batches(0), seed, 0):
        each += 1
        if seen is not None:
            seen(batch)
    if each == 0:
        raise InputRefused("DT303", "training needs at least one batch (got none)", fix=_FRESH)
    return -(-each // group)


def steps(batches: Batches, group: int, seed: int, epoch: int, skip: int) -> Iterator[Step]:
    """Steps of `group` batches from the given epoch on, without end; the first `skip` of that epoch are left out.

    The last step of an epoch may hold fewer batches.
    """
    while True:
        index = 0
        for index, (last, together) in enumerate(_grouped(drawn(lambda: batches(epoch), seed, epoch), group), 1):  # noqa: B023
            if index > skip:
                yield Step(epoch, index - 1, last, together)
        if index == 0:
            raise InputRefused("DT303", f"training needs batches in every epoch (got none in epoch {epoch + 1})",
                               fix=_FRESH)  # fmt: skip
        epoch, skip = epoch + 1, 0


def _grouped(batches: Iterator[Batch], group: int) -> Iterator[tuple[bool, tuple[Batch, ...]]]:
    """(is it the last, `group` batches) one group late: only the next batch tells whether it was the last."""
    held: list[Batch] = []
    for batch in batches:
        if len(held) == group:
            yield False, tuple(held)
            held = []
        held.append(batch)
    if held:
        yield True, tuple(held)

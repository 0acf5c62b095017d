"""The training loop behind every step that trains: AdamW, one schedule, clipped gradients, kept zeros.

AdamW: Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR 2019; the cosine is their SGDR's (2017).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from deploytool.errors import BackendFailed, CheckFailed, InputRefused

Batch = Mapping[str, Tensor]
_LINES = 10  # lines of progress in all


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    epochs, steps   passes over the batches, and the most optimizer steps of all together
    learning_rate   at the start; "cosine" falls to zero at the last step
    clip_norm       largest L2 norm of all gradients together
    weight_decay    AdamW's, per unit of learning rate
    """

    epochs: int
    learning_rate: float
    steps: int | None = None
    shape: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0


def fit(
    module: nn.Module,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[Batch], Tensor],
    schedule: Schedule,
    *,
    masks: Mapping[str, Tensor] | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> list[float]:
    """Train the floating-point parameters of `module` in place; the loss of every step.

    `batches(epoch)` gives one pass; `loss(batch)` runs the module. Weights where `masks` is False are zero after every
    step. The same seed gives the same weights. Raises CheckFailed when the loss or a gradient is NaN or infinite, and
    InputRefused when there are no batches.
    """
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    was_training = module.training
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        module.train()
        with _deterministic(schedule.seed):
            total = _total_steps(batches, schedule)
            return _run(module, parameters, _stream(batches, total), loss, schedule, total, masks or {}, progress)
    except RuntimeError as error:
        raise BackendFailed("DT504", f"a training step must run (got: {str(error)[:500]})") from error
    finally:
        module.train(was_training).requires_grad_(False)


def learning_rate(schedule: Schedule, step: int, total: int) -> float:
    """The rate of step 0 .. total - 1; the cosine starts at the full rate and would be zero at step `total`."""
    if schedule.shape == "constant":
        return schedule.learning_rate
    return schedule.learning_rate * 0.5 * (1.0 + math.cos(math.pi * step / total))


def apply_masks(module: nn.Module, masks: Mapping[str, Tensor]) -> None:
    """Set to zero every weight whose mask is False."""
    with torch.no_grad():
        for name, mask in masks.items():
            module.get_parameter(name).masked_fill_(~mask, 0.0)


def _run(
    module: nn.Module,
    parameters: list[nn.Parameter],
    batches: Iterator[Batch],
    loss: Callable[[Batch], Tensor],
    schedule: Schedule,
    total: int,
    masks: Mapping[str, Tensor],
    progress: Callable[[str], None],
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, total)
        value = loss(batch)
        losses.append(value.item())
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        norm = nn.utils.clip_grad_norm_(parameters, schedule.clip_norm).item()
        if not (math.isfinite(losses[-1]) and math.isfinite(norm)):
            raise CheckFailed("DT105", f"loss and gradients must be finite (got loss {losses[-1]:g}, gradient norm "
                              f"{norm:g} at step {step + 1} of {total})",
                              fix="lower learning_rate, or check the training data")  # fmt: skip
        optimizer.step()
        apply_masks(module, masks)
        if (step + 1) % max(1, total // _LINES) == 0:
            progress(f"step {step + 1}/{total} loss {losses[-1]:.4f}")
    return losses


def _total_steps(batches: Callable[[int], Iterable[Batch]], schedule: Schedule) -> int:
    each = sum(1 for _ in batches(0))
    if each == 0:
        raise InputRefused("DT303", "training needs at least one batch (got none)",
                           fix="let train_batches() give a fresh iterable at every call")  # fmt: skip
    return min(schedule.epochs * each, schedule.steps or schedule.epochs * each)


def _stream(batches: Callable[[int], Iterable[Batch]], total: int) -> Iterator[Batch]:
    """Exactly `total` batches, epoch after epoch."""
    given, epoch = 0, 0
    while given < total:
        before = given
        for batch in batches(epoch):
            if given == total:
                return
            given += 1
            yield batch
        if given == before:
            raise InputRefused("DT303", f"training needs batches in every epoch (got none in epoch {epoch + 1})",
                               fix="let train_batches() give a fresh iterable at every call")  # fmt: skip
        epoch += 1


@contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seeded, with deterministic kernels; the caller's random state and setting come back."""
    before = torch.are_deterministic_algorithms_enabled()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)

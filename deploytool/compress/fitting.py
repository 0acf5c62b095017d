"""Between the steps that train and the loop: where batches come from, and what a step's settings mean to the loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from deploytool.compress.step import Context
from deploytool.compress.training import TrainingTable
from deploytool.errors import InputRefused, nearest
from deploytool.load.flat import as_tensor
from deploytool.source import Source
from deploytool.train.checkpoint import Saving
from deploytool.train.loop import Trained, fit
from deploytool.train.schedule import Schedule
from deploytool.train.stream import IGNORED, Batch, Batches

_LABELS = "target"
OwnLoss = Callable[[dict[str, Tensor], Batch], Tensor]


def train(
    module: nn.Module, batches: Batches, loss: Callable[[Batch], Tensor], settings: TrainingTable, context: Context,
    masks: Mapping[str, Tensor], before_step: Callable[[int, int], None] = lambda step, total: None,
) -> Trained:  # fmt: skip
    """Train `module` in place as the step's settings say."""
    schedule = Schedule(
        settings.epochs, settings.learning_rate, settings.steps, settings.schedule, settings.clip_norm,
        settings.weight_decay, seed_of(settings, context), settings.warmup_steps, settings.accumulate,
        settings.precision, settings.gradient_checkpointing, settings.patience, settings.parallel,
    )  # fmt: skip
    folder = context.checkpoints
    saving = None if folder is None else Saving(folder, context.checkpoint_every, settings.model_dump_json())
    return fit(module, batches, loss, schedule, masks=masks, before_step=before_step, saving=saving,
               progress=lambda line: context.progress(f"{settings.step}: {line}"))  # fmt: skip


def seed_of(settings: TrainingTable, context: Context) -> int:
    """The step's own seed, or the command's."""
    return context.seed if settings.seed is None else settings.seed


def outputs_of(flat: nn.Module, source: Source, batch: Batch) -> dict[str, Tensor]:
    """The named outputs for a batch, which may hold labels besides the inputs."""
    signature = source.signature
    missing = [name for name in signature.input_names if name not in batch]
    if missing:
        raise InputRefused("DT303", f"training batches must hold the model's inputs (missing: {', '.join(missing)})",
                           detail=[nearest(name, batch) for name in missing])  # fmt: skip
    outputs = flat(*(as_tensor(name, batch[name]) for name in signature.input_names))
    return dict(zip(signature.output_names, outputs, strict=True))


def labelled_batches(source: Source, step: str) -> tuple[Batches, OwnLoss]:
    """The model file's own batches, one epoch by its number, and its loss; refused where one is lacking."""
    lacking = [hook for hook in ("train_batches", "loss") if getattr(source, hook) is None]
    if source.train_batches is None or source.loss is None:
        raise InputRefused("DT313", f"step {step!r} needs a model with {' and '.join(f'{h}()' for h in lacking)} "
                           f"({source.ref.name} has none)",
                           fix="add them to the model file, or use the step distill, which needs neither")  # fmt: skip
    return _by_epoch(source.train_batches), source.loss


def any_batches(source: Source, settings: TrainingTable, context: Context) -> tuple[Batches, str]:
    """One epoch of batches by its number, and where they come from: train_batches, or else the samples."""
    if source.train_batches is None:
        return _shuffled(context.samples(source), seed_of(settings, context)), "samples"
    return _by_epoch(source.train_batches), "train_batches"


def next_tokens(source: Source, batch: Batch) -> tuple[Tensor, int]:
    """The true next token of every position, and of how many positions it is known."""
    if _LABELS in batch:
        return batch[_LABELS], batch[_LABELS].shape[1]
    tokens = [batch[n] for n in source.signature.input_names if batch[n].ndim == 2 and not batch[n].is_floating_point()]
    if not tokens:
        raise InputRefused("DT303", "token-scaled distillation needs token ids [batch, tokens], or a target of that "
                           "shape, in the batches (got none)")  # fmt: skip
    ids, mask = tokens[0], batch.get("attention_mask")
    labels = ids[:, 1:]
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, IGNORED), labels.shape[1]


def _by_epoch(given: Callable[..., Iterable[dict[str, Tensor]]]) -> Batches:
    if "epoch" in inspect.signature(given).parameters:  # a model file may shuffle by itself
        return lambda epoch: given(epoch=epoch)
    return lambda epoch: given()


def _shuffled(samples: Sequence[dict[str, Tensor]], seed: int) -> Batches:
    """The samples in an order of its own for every epoch."""

    def epoch_batches(epoch: int) -> Iterable[Mapping[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed + epoch)
        return (samples[i] for i in torch.randperm(len(samples), generator=generator).tolist())

    return epoch_batches

"""Knowledge distillation: the compressed model learns to give what the original gives.

    loss = alpha T^2 KL(softmax(t / T) || softmax(s / T)) + (1 - alpha) loss(s, labels)

with the teacher's logits t, the student's s and the temperature T; T^2 keeps the gradient's size when T changes.
Source: Hinton, Vinyals, Dean, "Distilling the knowledge in a neural network", 2015.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, mse_loss

from deploytool.compress.distill.tables import Distill
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.load.flat import as_tensor
from deploytool.load.surgery import with_module
from deploytool.source import Source
from deploytool.train.loop import fit
from deploytool.train.schedule import Schedule
from deploytool.train.stream import Batch

_DEFAULT_TEMPERATURE = 2.0
_DEFAULT_ALPHA = 0.5


def soft_loss(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), nats; logits [..., classes], mean over the other axes."""
    wanted = log_softmax(teacher / temperature, dim=-1)
    given = log_softmax(student / temperature, dim=-1)
    return temperature**2 * (wanted.exp() * (wanted - given)).sum(dim=-1).mean()


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine along the last axis [..., width], mean over the others."""
    return (1.0 - cosine_similarity(student, teacher, dim=-1)).mean()


def apply(source: Source, settings: Distill, context: Context) -> tuple[Source, dict[str, Any]]:
    """Train a copy towards the uncompressed model; pruned weights stay zero."""
    outputs = _outputs(source, settings)
    match = settings.match or ("kl" if outputs == ("logits",) else "mse")
    temperature = settings.temperature or _DEFAULT_TEMPERATURE
    alpha = _alpha(source, settings)
    batches, origin = _batches(source, context)
    teacher, student = context.original.flat, with_module(source, copy.deepcopy(source.module))
    compare: Callable[[Tensor, Tensor], Tensor] = {
        "kl": lambda s, t: soft_loss(s, t, temperature), "mse": mse_loss, "cosine": cosine_loss,
    }[match]  # fmt: skip

    def loss(batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = _run(teacher, source, batch)
        given = _run(student.flat, source, batch)
        value = alpha * torch.stack([compare(given[name], wanted[name]) for name in outputs]).sum()
        if alpha < 1 and source.loss is not None:
            value = value + (1 - alpha) * source.loss(given, batch)
        return value

    seed = context.seed if settings.seed is None else settings.seed
    schedule = Schedule(settings.epochs, settings.learning_rate, settings.steps, settings.schedule, seed=seed)
    trained = fit(student.module, batches, loss, schedule, masks=source.masks,
                 progress=lambda line: context.progress(f"distill: {line}"))  # fmt: skip
    report = {
        "outputs": list(outputs), "match": match, "temperature": temperature if match == "kl" else None,
        "alpha": alpha, "data": origin, "seed": seed, **trained.report(),
        "masked_weights": len(source.masks), "layers": [], "skipped": [],
    }  # fmt: skip
    return with_module(student, student.module), report


def _run(flat: nn.Module, source: Source, batch: Batch) -> dict[str, Tensor]:
    """The named outputs for a batch, which may hold labels besides the inputs."""
    signature = source.signature
    missing = [name for name in signature.input_names if name not in batch]
    if missing:
        raise InputRefused("DT303", f"training batches must hold the model's inputs (missing: {', '.join(missing)})",
                           detail=[nearest(name, batch) for name in missing])  # fmt: skip
    outputs = flat(*(as_tensor(name, batch[name]) for name in signature.input_names))
    return dict(zip(signature.output_names, outputs, strict=True))


def _outputs(source: Source, settings: Distill) -> tuple[str, ...]:
    """The outputs to match; raises UsageProblem when they are unknown or cannot be guessed."""
    floats = [spec.name for spec in source.signature.outputs if spec.dtype.startswith("float")]
    unknown = [name for name in settings.output if name not in floats]
    if unknown:
        raise UsageProblem("DT204", f"distill's output must be a floating-point output of the model (got "
                           f"{', '.join(unknown)})", detail=[nearest(name, floats) for name in unknown])  # fmt: skip
    if settings.output:
        return settings.output
    if "logits" in floats or len(floats) == 1:
        return ("logits",) if "logits" in floats else (floats[0],)
    raise UsageProblem("DT204", "distill must be told which output to match (got none, and none is called logits)",
                       detail=[f"outputs: {', '.join(floats)}"], fix=f'add output = "{floats[0]}"')  # fmt: skip


def _alpha(source: Source, settings: Distill) -> float:
    """The weight of the match; without labels or a loss it can only be 1."""
    labelled = source.train_batches is not None and source.loss is not None
    if settings.alpha is not None and settings.alpha < 1 and not labelled:
        raise UsageProblem("DT204", f"alpha must be 1 for a model without train_batches() and loss() (got "
                           f"{settings.alpha:g})", fix="leave alpha out, or add both to the model file")  # fmt: skip
    return settings.alpha if settings.alpha is not None else (_DEFAULT_ALPHA if labelled else 1.0)


def _batches(source: Source, context: Context) -> tuple[Callable[[int], Iterable[Batch]], str]:
    """One epoch of batches by its number, and where they come from."""
    given = source.train_batches
    if given is None:
        return _shuffled(context.samples(source), context.seed), "samples"
    if "epoch" in inspect.signature(given).parameters:  # a model file may shuffle by itself
        return lambda epoch: given(epoch=epoch), "train_batches"  # type: ignore[call-arg]
    return lambda epoch: given(), "train_batches"


def _shuffled(samples: list[dict[str, Tensor]], seed: int) -> Callable[[int], Iterable[Mapping[str, Tensor]]]:
    """The samples in an order of its own for every epoch."""

    def epoch_batches(epoch: int) -> Iterable[Mapping[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed + epoch)
        return [samples[i] for i in torch.randperm(len(samples), generator=generator)]

    return epoch_batches

"""Distillation: the compressed model learns to give what the original gives.

    loss = alpha match + (1 - alpha) own loss + hidden_weight h + relation_weight r

with `match` of the outputs (temperature.py, token_scaled.py), h of hidden states and r of relations (relation.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from deploytool.compress.distill.cached import TeacherCache
from deploytool.compress.distill.inner import InnerLosses
from deploytool.compress.distill.tables import Distill
from deploytool.compress.distill.temperature import cosine_loss, soft_loss, temperature_at
from deploytool.compress.distill.token_scaled import token_scaled_loss
from deploytool.compress.fitting import any_batches, next_tokens, outputs_of, seed_of, train
from deploytool.compress.qat.weights import on_grids
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.load.compressed import state_sha256
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import with_module
from deploytool.source import Source
from deploytool.train.parallel import device
from deploytool.train.stream import Batch

_DEFAULT_TEMPERATURE = 2.0
_DEFAULT_ALPHA = 0.5


def apply(source: Source, settings: Distill, context: Context) -> tuple[Source, dict[str, Any]]:
    """Train a copy towards the teacher; pruned weights stay zero, quantized ones stay on their grids."""
    outputs = _outputs(source, settings)
    match = settings.match or ("kl" if outputs == ("logits",) else "mse")
    alpha = 1.0 if match == "tsld" else _alpha(source, settings)
    batches, origin = any_batches(source, settings, context)
    teacher_source = context.original if settings.teacher is None else open_source(resolve(settings.teacher))
    _same_interface(source, teacher_source, outputs)
    teacher = teacher_source.flat.to(device())
    student = with_module(source, copy.deepcopy(source.module))
    temperature = _Temperature(settings)
    compare = _comparison(match, settings, temperature, source)
    own = source.loss if origin == "train_batches" and (alpha < 1 or match == "tsld") else None
    cache = None if settings.cache is None else TeacherCache(
        Path(settings.cache), state_sha256(teacher_source.module), outputs, settings.cache_top_k)  # fmt: skip
    with ExitStack() as stack:
        inner = stack.enter_context(InnerLosses(student.module, teacher_source.module, settings))
        trained_module = inner.with_projections(student.module)
        grids = stack.enter_context(on_grids(student.module, source))

        def loss(batch: Batch) -> Tensor:
            wanted = _taught(teacher, teacher_source, batch, cache)
            given = outputs_of(student.flat, source, batch)
            _same_classes(given, wanted, outputs)
            value = alpha * torch.stack([compare(given[name], wanted[name], batch) for name in outputs]).sum()
            if own is not None:
                value = value + (1.0 if match == "tsld" else 1 - alpha) * own(given, batch)
            return value + inner.loss()

        masks = {inner.name(grids.name(name)): mask for name, mask in source.masks.items()}
        done = train(trained_module, batches, loss, settings, context, masks, before_step=temperature.move)
        encodings = grids.bake()
    teacher_source.flat.to("cpu")
    report = {
        "outputs": list(outputs), "match": match, "teacher": teacher_source.ref.name,
        "temperature": temperature.value if match == "kl" else None, "alpha": None if match == "tsld" else alpha,
        "data": origin, "seed": seed_of(settings, context), **done.report(), "masked_weights": len(source.masks),
        "weights_on_grids": len(encodings), "teacher_runs": None if cache is None else cache.misses,
        "hidden": inner.hidden, "relations": settings.relations, "layers": [], "skipped": [],
    }  # fmt: skip
    if cache is not None:
        cache.close()
    return with_module(student, student.module, encodings=encodings), report


class _Temperature:
    """The temperature of the step at hand."""

    def __init__(self, settings: Distill):
        self.start = settings.temperature or _DEFAULT_TEMPERATURE
        self.end = self.start if settings.temperature_end is None else settings.temperature_end
        self.floor = min(settings.temperature_floor, self.start)
        self.value = self.start

    def move(self, step: int, total: int) -> None:
        self.value = temperature_at(step, total, self.start, self.end, self.floor)


def _comparison(
    match: str, settings: Distill, temperature: _Temperature, source: Source
) -> Callable[[Tensor, Tensor, Batch], Tensor]:
    def tsld(given: Tensor, wanted: Tensor, batch: Batch) -> Tensor:
        labels, count = next_tokens(source, batch)
        return token_scaled_loss(given[:, :count], wanted[:, :count], labels, settings.token_temperature)

    plain: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "kl": lambda s, t: soft_loss(s, t, temperature.value), "mse": mse_loss, "cosine": cosine_loss,
    }  # fmt: skip
    return tsld if match == "tsld" else lambda given, wanted, batch: plain[match](given, wanted)


def _taught(teacher: nn.Module, source: Source, batch: Batch, cache: TeacherCache | None) -> dict[str, Tensor]:
    """What the teacher gives for a batch, from the cache where it is there."""

    def run() -> dict[str, Tensor]:
        with torch.no_grad():
            return outputs_of(teacher, source, batch)

    if cache is None:
        return run()
    kept = cache(batch, source.signature.input_names, run)
    return {name: value.to(device()) for name, value in kept.items()}


def _same_interface(student: Source, teacher: Source, outputs: tuple[str, ...]) -> None:
    lacking = [n for n in student.signature.input_names if n not in teacher.signature.input_names]
    lacking += [name for name in outputs if name not in teacher.signature.output_names]
    if lacking:
        raise UsageProblem("DT204", f"the teacher must have the student's inputs and outputs (missing: "
                           f"{', '.join(lacking)})")  # fmt: skip


def _same_classes(given: dict[str, Tensor], wanted: dict[str, Tensor], outputs: tuple[str, ...]) -> None:
    for name in outputs:
        if given[name].shape != wanted[name].shape:
            raise InputRefused("DT303", f"teacher and student must have one vocabulary: {name!r} must have one shape "
                               f"(got {list(wanted[name].shape)} of the teacher, {list(given[name].shape)} of the "
                               "student)")  # fmt: skip


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

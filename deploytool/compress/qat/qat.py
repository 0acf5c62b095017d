"""Quantization-aware training: the model learns with its weights, and its layers' inputs, already on their grids."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from deploytool.compress.blocks import check_samples
from deploytool.compress.distill.temperature import soft_loss
from deploytool.compress.distill.token_scaled import token_scaled_loss
from deploytool.compress.fitting import any_batches, next_tokens, outputs_of, seed_of, train
from deploytool.compress.matrices import matrix
from deploytool.compress.qat.activations import KINDS, extremes_of, freeze
from deploytool.compress.qat.tables import Qat
from deploytool.compress.qat.weights import WeightGrids
from deploytool.compress.quantize.layers import Skipped, chosen_layers, group_of, refuse_none, shrinks_of, weight_name
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.step import Context
from deploytool.encoding import Encoding
from deploytool.errors import UsageProblem
from deploytool.load.input_grid import CHILD
from deploytool.load.surgery import apply_edits, with_module
from deploytool.source import Source
from deploytool.train.parallel import device
from deploytool.train.stream import Batch


def apply(source: Source, settings: Qat, context: Context) -> tuple[Source, dict[str, Any]]:
    """Train a copy of the source on grids; weights that lie on grids of the kind asked for start from theirs."""
    towards = _towards(source, settings)
    batches, origin = any_batches(source, settings, context)
    student = with_module(source, copy.deepcopy(source.module))
    layers, skipped = chosen_layers(student.module, settings)
    edits = _add_input_grids(student, layers, skipped, settings, context)
    refuse_none("qat", list(layers), skipped)
    encodings = {weight_name(name): _encoding(layer, settings, source.encodings.get(weight_name(name)))
                 for name, layer in layers.items()}  # fmt: skip
    encodings |= {n: e for n, e in source.encodings.items() if n not in encodings}
    loss = _loss(source, student, context.original, settings, towards)
    with WeightGrids(student.module, encodings, settings.ranges) as grids:
        masks = {grids.name(name): mask for name, mask in source.masks.items()}
        done = train(student.module, batches, loss, settings, context, masks)
        encodings = grids.bake()
    told = [{"layer": name, "bits": settings.bits, **(freeze(layer, int(settings.activations)) if edits else {})}
            for name, layer in layers.items()]  # fmt: skip
    report = {
        "towards": towards, "data": origin, "seed": seed_of(settings, context), **done.report(),
        "masked_weights": len(source.masks), "layers": told, "skipped": skipped,
    }  # fmt: skip
    context.original.flat.to("cpu")
    return with_module(student, student.module, encodings=encodings, edits=(*source.edits, *edits)), report


def _encoding(layer: nn.Module, settings: Qat, before: Encoding | None) -> Encoding:
    weight = matrix(layer)
    kind = settings.bits, group_of(weight, settings.group), settings.symmetric
    if before is not None and before.axis == 0 and (before.bits, before.group, before.symmetric) == kind:
        return before
    return choose(weight, *kind, shrinks=shrinks_of(settings))


def _add_input_grids(
    student: Source, layers: dict[str, nn.Module], skipped: Skipped, settings: Qat, context: Context
) -> list[dict[str, Any]]:
    """Grids for the layers' inputs, from the extremes on the calibration samples; the edits that make them again.

    Layers that did not run move to `skipped`.
    """
    if settings.activations == "none":
        return []
    if twice := [name for name, layer in layers.items() if hasattr(layer, CHILD)]:
        raise UsageProblem("DT204", f"qat must choose layers whose inputs are not quantized yet (the inputs are on "
                           f"grids already at {', '.join(twice[:5])})",
                           fix='set activations = "none", or exclude these layers')  # fmt: skip
    samples, bits = context.samples(student), int(settings.activations)
    check_samples(samples)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def keep(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen[name] = extremes_of(inputs[0], seen.get(name))

        return keep

    handles = [layer.register_forward_pre_hook(keeper(name)) for name, layer in layers.items()]
    with torch.no_grad():
        for sample in samples:
            outputs_of(student.flat, student, sample)
    for handle in handles:
        handle.remove()
    for name in [name for name in layers if name not in seen]:
        del layers[name]
        skipped.append({"layer": name, "reason": "it did not run on the calibration samples"})
    edits = [{"kind": "input_grid", "layer": name, "bits": bits} for name in layers]
    apply_edits(student.module, edits)
    for name, layer in layers.items():
        layer.add_module(CHILD, KINDS[settings.ranges](bits, *seen[name], settings.symmetric_activations))
    return edits


def _loss(source: Source, student: Source, original: Source, settings: Qat, towards: str) -> Callable[[Batch], Tensor]:
    """The mean of what is trained towards; with "tsld" their sum, as its authors have it."""
    floats = [spec.name for spec in source.signature.outputs if spec.dtype.startswith("float")]
    name = "logits" if "logits" in floats else floats[0]
    match = settings.match or ("kl" if name == "logits" else "mse")
    teacher, own = original.flat.to(device()), source.loss

    def distance(given: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = outputs_of(teacher, original, batch)[name]
        if match == "tsld":
            labels, count = next_tokens(source, batch)
            return token_scaled_loss(given[:, :count], wanted[:, :count], labels, settings.token_temperature)
        return soft_loss(given, wanted, settings.temperature) if match == "kl" else mse_loss(given, wanted)

    def loss(batch: Batch) -> Tensor:
        given = outputs_of(student.flat, source, batch)
        parts = [] if towards == "labels" else [distance(given[name], batch)]
        parts += [] if towards == "original" or own is None else [own(given, batch)]
        return torch.stack(parts).sum() if match == "tsld" else torch.stack(parts).mean()

    return loss


def _towards(source: Source, settings: Qat) -> str:
    labelled = source.train_batches is not None and source.loss is not None
    if settings.towards in ("labels", "both") and not labelled:
        raise UsageProblem("DT204", f"towards must be 'original' for a model without train_batches() and loss() "
                           f"(got {settings.towards!r})",
                           fix="leave towards out, or add both to the model file")  # fmt: skip
    return settings.towards or ("both" if labelled else "original")

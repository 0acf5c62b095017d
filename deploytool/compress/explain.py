"""What the steps of a recipe would do to the model at hand, and what to expect of it, before they run.

Steps that look at nothing but shapes and a few samples are run on a throwaway copy: what is told of them is what they
do. Of those that calibrate or train for long, the layers and sizes follow from their settings, the time from one run.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploytool.compress.calls import plain_forward
from deploytool.compress.factorize.ranks import largest_saving_rank, rank_for_keep
from deploytool.compress.fitting import any_batches, outputs_of
from deploytool.compress.linears import with_linears
from deploytool.compress.matrices import matrix, matrix_layers
from deploytool.compress.recipe import Recipe, load_recipe
from deploytool.compress.run import measure
from deploytool.compress.select import select
from deploytool.compress.step import Context, StepTable
from deploytool.compress.training import TrainingTable
from deploytool.errors import counted
from deploytool.load.model import open_source
from deploytool.source import ModelRef, Source

SCHEMA_VERSION = "1.0"
_RUN = ("magnitude", "plain-attention", "blockwise-attention", "local-attention", "fnet", "tucker",
        "low-rank-embedding", "drop-layers")  # fmt: skip
_LISTED = 8


def explain_job(ref: Mapping[str, str], recipe_path: str, seed: int = 0) -> dict[str, Any]:
    """What a worker runs: open the model and explain the recipe's steps; JSON in, JSON out."""
    return explain(open_source(ModelRef(**ref)), load_recipe(Path(recipe_path)), seed=seed)


def explain(source: Source, recipe: Recipe, *, seed: int = 0) -> dict[str, Any]:
    """For every step: whether it was tried, the layers it would change, what it would skip, sizes, and sentences.

    A step is told on what the steps before it leave, as far as these were tried; "without" has the numbers of those
    that were not, so that it is told as if they had not run.
    """
    context = Context(source, recipe.calibration, seed, lambda line: None)
    told: list[dict[str, Any]] = []
    current, _ = with_linears(source)
    for settings in recipe.steps:
        without = [number for number, row in enumerate(told, 1) if not row["tried"]]
        if settings.step in _RUN:
            after, row = _tried(current, settings, context)
        else:
            after, row = current, _forecast(current, settings, context)
        told.append({"step": settings.step, "settings": settings.model_dump(mode="json"), **row,
                     "without": without})  # fmt: skip
        current = after
    return {"schema_version": SCHEMA_VERSION, "model": source.ref.name, "recipe": recipe.where, "explained": told}


def _tried(source: Source, settings: StepTable, context: Context) -> tuple[Source, dict[str, Any]]:
    """The step on a copy: its own report, sizes before and after, and how the first sample's outputs change."""
    after, did = importlib.import_module(settings.code).apply(source, settings, context)
    sizes = {"before": _sizes(source), "after": _sizes(after)}
    change = _change(source, after)
    kept = f"keeps {len(did['kept'])} of {did['before']} {did['blocks']}" if "kept" in did else None
    said = [kept or f"changes {counted(len(did['layers']), 'layer')}, leaves {len(did['skipped'])} alone",
            f"moves the outputs of the first sample by {change:.2%} of their size"]  # fmt: skip
    if settings.step == "local-attention":
        said += [_saved_scores(row) for row in did["layers"][:1]]
    return after, {"tried": True, "layers": [row["layer"] for row in did["layers"]], "skipped": did["skipped"],
                   **sizes, "output_change": change, "effect": said}  # fmt: skip


def _forecast(source: Source, settings: StepTable, context: Context) -> dict[str, Any]:
    """What follows from the settings and the shapes alone."""
    layers, skipped = matrix_layers(source.module)
    include, exclude = (getattr(settings, name, ()) for name in ("include", "exclude"))
    chosen = select(layers, include, exclude) if include or exclude else set(layers)
    weights = {name: tuple(matrix(layers[name]).shape) for name in layers if name in chosen}
    seconds = _seconds(source, context)
    said = _sizes_said(settings, weights)
    if isinstance(settings, TrainingTable):
        weights = {} if settings.step in ("distill", "finetune") else weights
        said.append(f"trains all {sum(p.numel() for p in source.module.parameters())} parameters; zeros and the number "
                    "of weights stay as they are")  # fmt: skip
        said += _training_said(settings, source, context)
    elif not said:
        said = ["has no forecast: run it with a small [calibration] first"]
    else:
        said.append(f"one pass over the calibration samples takes about {seconds:.2g} s")
    return {"tried": False, "layers": list(weights), "skipped": skipped, "before": _sizes(source), "after": None,
            "output_change": None, "effect": said}  # fmt: skip


def _sizes_said(settings: StepTable, weights: Mapping[str, tuple[int, ...]]) -> list[str]:
    total = sum(rows * columns for rows, columns in weights.values())
    value, layers, now = settings.model_dump(), counted(len(weights), "layer"), f"{4 * total} bytes in fp32"
    if settings.step == "svd":
        return [_svd_said(value, weights, total)]
    if settings.step == "smoothquant":
        return [f"moves ranges of activations into the weights of up to {layers}: sizes stay as they are, outputs too "
                "until a target quantizes both"]  # fmt: skip
    if settings.step == "narrow":
        shares = [f"{value[unit]:.0%} of the {unit}" for unit in ("heads", "neurons", "channels") if value[unit]]
        return [f"keeps {' and '.join(shares)} of up to {layers}; these really get smaller and faster, by up to the "
                f"rest of {total} weights"]  # fmt: skip
    if settings.step == "mixed-precision":
        return [f"gives {layers} {', '.join(map(str, value['choices']))} bits each, most where most is lost: {now} "
                f"become about {round(total * value['mean_bits'] / 8)} with the scales"]  # fmt: skip
    if value.get("pattern") or value.get("sparsity") is not None:
        share = _zeros(value)
        stored = (1 - share) + 1 / 32
        return [f"sets {share:.0%} of {total} weights in {layers} to zero: {now} are stored in about "
                f"{round(4 * total * stored)}; engines run no faster for it"]  # fmt: skip
    if value.get("bits"):
        return [f"puts {total} weights in {layers} on grids of {value['bits']} bits: {now} become about "
                f"{total * value['bits'] // 8} and the scales"]  # fmt: skip
    if value.get("remove"):
        return [f"removes {value['remove']:.0%} of the units of up to {layers}; these really get smaller and faster, "
                f"by up to that share of {total} weights"]  # fmt: skip
    return []


def _svd_said(value: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]], total: int) -> str:
    layers = counted(len(weights), "layer")
    if value["budget"] is not None:
        return f"leaves {round(total * value['budget'])} of {total} weights, spent where the outputs need them"
    if value["energy"] is not None:
        return f"chooses the rank of {layers} by their singular values: {total} weights or fewer remain"
    left = factored = 0
    for rows, columns in weights.values():
        rank = value["rank"] or rank_for_keep(rows, columns, value["keep"])
        saves = rank <= largest_saving_rank(rows, columns)
        factored += saves
        left += rank * (rows + columns) if saves else rows * columns
    return f"factors {factored} of {layers}: {left} of {total} weights remain, and as much of the work"


def _zeros(value: Mapping[str, Any]) -> float:
    if value.get("pattern"):
        kept, _, of = str(value["pattern"]).partition(":")
        return 1 - int(kept) / int(of)
    return float(value["sparsity"])


def _saved_scores(row: Mapping[str, Any]) -> str:
    tokens, window = row["tokens"], row["window"]
    seen = min(tokens, 3 * window + row["globals_"] + (tokens // row["stride"] if row["stride"] else 0))
    return f"computes about {seen} of {tokens} scores for each token at the first sample's length"


def _training_said(settings: TrainingTable, source: Source, context: Context) -> list[str]:
    value = settings.model_dump()
    lacking = source.train_batches is None or source.loss is None
    if lacking and "finetune" in (settings.step, value.get("train")):
        return ["it will be refused: the model file has no train_batches() or no loss()"]
    epoch, where = any_batches(source, settings, context)
    batches = sum(1 for _ in epoch(0))
    steps = -(-batches // settings.accumulate) * settings.epochs
    steps = (min(steps, settings.steps) if settings.steps else steps) * value.get("rounds", 1)
    seconds = steps * settings.accumulate * _batch_seconds(source, next(iter(epoch(0))))
    said = f"{counted(steps, 'optimizer step')} over {batches} batches an epoch, about {seconds:.2g} s here"
    return [said] + (["the model file has no train_batches, so the calibration samples are what it learns from"]
                     if where == "samples" else [])  # fmt: skip


def _batch_seconds(source: Source, batch: Mapping[str, Any]) -> float:
    """Of training on one batch: four forward runs, of which back-propagation takes two and a teacher one."""
    with plain_forward():
        outputs_of(source.flat, source, batch)  # the first run allocates
        started = time.perf_counter()
        outputs_of(source.flat, source, batch)
    return 4 * (time.perf_counter() - started)


def _sizes(source: Source) -> dict[str, int]:
    found = measure(source, evaluate=False)
    return {name: found[name] for name in ("parameters", "nonzeros", "size_bytes")}


def _change(before: Source, after: Source) -> float:
    """|o' - o| / |o| over all floating-point outputs of the first sample together."""
    sample = next(iter(before.samples()))
    arguments = [sample[name] for name in before.signature.input_names]
    with plain_forward():
        pairs = list(zip(before.flat(*arguments), after.flat(*arguments), strict=True))
    floats = [(a.double(), b.double()) for a, b in pairs if isinstance(a, Tensor) and a.is_floating_point()]
    moved = torch.stack([(b - a).square().sum() for a, b in floats]).sum()
    return float((moved / torch.stack([a.square().sum() for a, _ in floats]).sum().clamp(min=1e-30)).sqrt())


def _seconds(source: Source, context: Context) -> float:
    """Of one pass forward over the calibration samples, from one run of the first."""
    samples = context.samples(source)
    arguments = [samples[0][name] for name in source.signature.input_names]
    started = time.perf_counter()
    with plain_forward():
        source.flat(*arguments)
    one = time.perf_counter() - started
    elements = [sum(t.numel() for t in sample.values()) for sample in samples]
    return one * sum(elements) / max(elements[0], 1)

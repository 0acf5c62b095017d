"""Runs the steps of a recipe: Source -> Source, with a report of what was done and what it cost."""

from __future__ import annotations

import dataclasses
import importlib
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deploytool import child
from deploytool.compress.linears import with_linears
from deploytool.compress.recipe import Recipe, load_recipe
from deploytool.compress.step import Context, Progress
from deploytool.encoding import Encoding
from deploytool.errors import CheckFailed, InputRefused, UsageProblem
from deploytool.load.compressed import WEIGHTS, save_compressed
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import COMPRESSED
from deploytool.source import ModelRef, Source
from deploytool.storage import refuse_existing
from deploytool.train.parallel import first_process, from_first, refuse_unshared, wait_for_all

SCHEMA_VERSION = "1.0"


def compress(
    source: Source,
    recipe: Recipe,
    *,
    seed: int = 0,
    evaluate: bool = True,
    progress: Progress = lambda line: None,
    original: Source | None = None,
) -> tuple[Source, dict[str, Any]]:
    """Run the recipe's steps in order; the source that came out, and the report.

    `original` is the uncompressed source, opened when it is not given: the report's "before", and the teacher of
    distillation. Without `evaluate` no metrics are taken and "quality" says that nothing was judged.
    """
    if not recipe.steps:
        raise UsageProblem("DT204", f"{recipe.where} must hold at least one [[compress]] table (got none)")
    if recipe.training.checkpoints is not None:
        refuse_unshared(Path(recipe.training.checkpoints))
    if original is None:
        original = source if source.original is None else open_source(source.original)
    if evaluate and recipe.quality.max_drop is not None and original.evaluate is None:
        raise InputRefused("DT313", f"[quality] needs a model with evaluate() ({original.ref.name} has none)",
                           fix="add evaluate() to the model file, or remove max_drop")  # fmt: skip
    context = Context(original, recipe.calibration, seed, progress)
    before = after = measure(original, evaluate)
    steps: list[dict[str, Any]] = []
    current, linears = with_linears(source)
    if linears:
        progress(f"{len(linears)} layers that compute what a Linear does are one from here on: {linears[0]} ...")
    for number, settings in enumerate(recipe.steps, start=1):
        progress(f"step {number}/{len(recipe.steps)}: {settings.step}")
        started = time.perf_counter()
        apply = importlib.import_module(settings.code).apply
        current, did = apply(current, settings, _for_step(context, recipe, number))
        seconds = time.perf_counter() - started
        _check_runs(current, settings.step)
        current, lost = _drop_lost_encodings(current)
        if lost:
            did = {**did, "encodings_lost": lost}
            progress(f"{settings.step}: {len(lost)} quantized weights have left their grids and are floats again")
        after = measure(current, evaluate)
        steps.append({"step": settings.step, "seconds": seconds, "settings": settings.model_dump(mode="json"),
                      "after": after, **did})  # fmt: skip
    if current.original is None:
        current = dataclasses.replace(current, original=original.ref)
    report = {
        "schema_version": SCHEMA_VERSION, "model": source.ref.name, "recipe": recipe.where, "seed": seed,
        "before": before, "after": after, "steps": steps,
        "quality": judge(before["metrics"], after["metrics"], original.lower_is_better, recipe.quality.max_drop),
    }  # fmt: skip
    return current, report


def _for_step(context: Context, recipe: Recipe, number: int) -> Context:
    """The context of a step, with a folder of its own for checkpoints where the recipe wants them."""
    folder, every = recipe.training.checkpoints, recipe.training.every_steps
    if folder is None:
        return context
    place = Path(folder) / f"{number:02}-{recipe.steps[number - 1].step}"
    return dataclasses.replace(context, checkpoints=place, checkpoint_every=every)


def compress_job(
    ref: dict[str, str], recipe_path: str, out: str, seed: int = 0, evaluate: bool = True, overwrite: bool = False
) -> dict[str, Any]:
    """What a worker runs: open the model, compress it, write the folder; JSON in, JSON out.

    Raises CheckFailed, and writes nothing, when a metric drops by more than the recipe's [quality] allows.
    """
    refuse_existing(Path(out), overwrite, COMPRESSED)
    wait_for_all()  # or a process that starts late would find what the first one has written
    recipe = load_recipe(Path(recipe_path))
    source = open_source(ModelRef(**ref))
    original = source if source.original is None else open_source(source.original)
    compressed, report = compress(source, recipe, seed=seed, evaluate=evaluate, progress=_tell, original=original)
    if report["quality"]["passed"] is False:
        raise CheckFailed("DT104", f"no metric may drop by more than {recipe.quality.max_drop:g} of its value (got "
                          f"{_drops(report['quality']['drops'])})",
                          fix="compress less, train longer, or raise [quality] max_drop")  # fmt: skip
    stored = None
    if first_process():
        save_compressed(compressed, original, report, Path(out), overwrite=overwrite)
        stored = (Path(out) / WEIGHTS).stat().st_size
    return {**report, "stored_bytes": from_first(stored), "output": out}  # other machines may not see the folder


def measure(source: Source, evaluate: bool = True) -> dict[str, Any]:
    """Distinct parameters, how many are not zero, bytes of the distinct tensors of the state, and the metrics.

    A quantized weight counts with its codes, scales and zero points. Zeros count like other values: `stored_bytes` of
    the report, the size of the file that is written, tells what they save on disk.
    """
    parameters = list(source.module.parameters())
    tensors = {(t.data_ptr() or id(t), t.shape): (name, t) for name, t in source.module.state_dict().items()}
    return {
        "parameters": sum(p.numel() for p in parameters),
        "nonzeros": sum(int(p.count_nonzero()) for p in parameters),
        "size_bytes": sum(_bytes(t, source.encodings.get(name)) for name, t in tensors.values()),
        "metrics": _metrics(source) if evaluate else {},
    }


def _bytes(tensor: Tensor, encoding: Encoding | None) -> int:
    if encoding is None:
        return tensor.numel() * tensor.element_size()
    return math.ceil(tensor.numel() * encoding.bits / 8) + 2 * 4 * encoding.scale.numel()


def predict(source: Source, feeds: Mapping[str, Any]) -> dict[str, Tensor]:
    """The source's named outputs for named tensors."""
    with torch.inference_mode():
        outputs = source.flat(*(feeds[name] for name in source.signature.input_names))
    return dict(zip(source.signature.output_names, outputs, strict=True))


def judge(
    before: Mapping[str, float], after: Mapping[str, float], lower_is_better: tuple[str, ...], max_drop: float | None
) -> dict[str, Any]:
    """How much of every metric was lost, relative to its value before; "passed" is None where nothing was asked.

    A metric that is 0 before is compared as it is. A metric that is missing after fails the judgement.
    """
    missing = sorted(name for name in before if name not in after)
    drops: dict[str, float] = {}
    for name, value in before.items():
        if name not in missing:
            lost = after[name] - value if name in lower_is_better else value - after[name]
            drops[name] = lost / abs(value) if value else lost
    passed = None if max_drop is None or not before else not missing and all(d <= max_drop for d in drops.values())
    return {"max_drop": max_drop, "passed": passed, "drops": drops, "missing": missing}


def _metrics(source: Source) -> dict[str, float]:
    if source.evaluate is None:
        return {}
    metrics = {name: float(v) for name, v in source.evaluate(lambda feeds: predict(source, feeds)).items()}
    if not metrics:
        raise InputRefused("DT304", "evaluate() must give at least one metric (got none)")
    bad = [name for name, value in metrics.items() if not math.isfinite(value)]
    if bad:
        raise InputRefused("DT304", f"every metric must be finite (got NaN or infinity in {', '.join(bad)})")
    return metrics


def _check_runs(source: Source, step: str) -> None:
    """The changed module must still run on the first sample and give finite outputs."""
    sample = next(iter(source.samples()))
    try:
        outputs = predict(source, sample)
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise UsageProblem("DT204", f"the model must still run after step {step!r} (got {type(error).__name__}: "
                           f"{str(error)[:300]})",
                           fix="exclude layers that the model handles in its own way") from error  # fmt: skip
    bad = [n for n, t in outputs.items() if t.is_floating_point() and not bool(torch.isfinite(t).all())]
    if bad:
        raise CheckFailed("DT105", f"outputs must be finite after step {step!r} (got NaN or infinity in "
                          f"{', '.join(bad)})")  # fmt: skip


def _drop_lost_encodings(source: Source) -> tuple[Source, list[str]]:
    """The source without the encodings that a step made untrue by changing the weight, and the names of those."""
    state = source.module.state_dict()
    lost = sorted(n for n, e in source.encodings.items() if n not in state or not lies_on(state[n], e))
    kept = {name: e for name, e in source.encodings.items() if name not in lost}
    return (dataclasses.replace(source, encodings=kept) if lost else source), lost


def _drops(drops: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {drop:.4f}" for name, drop in drops.items()) or "a metric is missing"


def _tell(line: str) -> None:
    """To whoever watches this process, and to its log."""
    if first_process():
        child.progress(line)
        print(line, file=sys.stderr, flush=True)

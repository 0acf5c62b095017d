"""Pruning in rounds with training between them.

    share(t) = final + (start - final) (1 - t / rounds)^k      t = 1 .. rounds; k = 3 "cubic", 1 "linear"

Source: Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", ICLR 2018
workshop, equation 1.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from deploytool.compress.distill import distill
from deploytool.compress.distill.tables import Distill
from deploytool.compress.finetune import finetune
from deploytool.compress.finetune.tables import Finetune
from deploytool.compress.prune import magnitude, sparsegpt, wanda
from deploytool.compress.prune.tables import Magnitude, Progressive, SparseGpt, Wanda
from deploytool.compress.step import Context
from deploytool.compress.training import TrainingTable
from deploytool.source import Source

_PRUNERS: dict[str, tuple[Any, Any]] = {
    "magnitude": (magnitude.apply, Magnitude),
    "wanda": (wanda.apply, Wanda),
    "sparsegpt": (sparsegpt.apply, SparseGpt),
}
_TRAINERS: dict[str, tuple[Any, Any]] = {"distill": (distill.apply, Distill), "finetune": (finetune.apply, Finetune)}


def shares(start: float, final: float, rounds: int, growth: str) -> list[float]:
    """The share of zeros after each round; the last is `final`."""
    power = 3 if growth == "cubic" else 1
    return [final + (start - final) * (1 - t / rounds) ** power for t in range(1, rounds + 1)]


def apply(source: Source, settings: Progressive, context: Context) -> tuple[Source, dict[str, Any]]:
    """Prune and train by turns; zeros of one round stay zero in all later ones."""
    prune, pruning = _PRUNERS[settings.method]
    train, training = _TRAINERS[settings.train]
    how = {key: getattr(settings, key) for key in TrainingTable.model_fields if key != "step"}
    rounds = []
    did: dict[str, Any] = {}
    for number, share in enumerate(shares(settings.start, settings.sparsity, settings.rounds, settings.growth), 1):
        context.progress(f"progressive: round {number} of {settings.rounds}, {share:.1%} zeros")
        asked = pruning(step=settings.method, sparsity=share, include=settings.include, exclude=settings.exclude)
        source, did = prune(source, asked, context)
        source, learnt = train(source, training(step=settings.train, **how), _within(context, number))
        rounds.append({"sparsity": share, **{k: v for k, v in learnt.items() if k not in ("layers", "skipped")}})
    return source, {"layers": did["layers"], "skipped": did["skipped"], "rounds": rounds}


def _within(context: Context, number: int) -> Context:
    """The round's own folder for checkpoints, and its own seed."""
    folder = context.checkpoints
    return dataclasses.replace(context, seed=context.seed + number,
                               checkpoints=None if folder is None else folder / f"round-{number}")  # fmt: skip

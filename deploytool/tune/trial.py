"""What a search is asked, and what it knows of one configuration."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploytool.tune.space import Config
from deploytool.tune.workshop import Product

Objective = Literal["latency", "size", "memory", "energy"]


@dataclass(frozen=True)
class Question:
    """What is asked for. `buckets` name what each case stands for; with `pack` each of them gets its own best."""

    objective: Objective
    max_drop: float
    budget_seconds: float
    buckets: tuple[str, ...]
    exhaustive: bool = False
    seed: int = 0
    pack: bool = False


@dataclass
class Trial:
    """What is known of one configuration: it grows as the search goes on.

    value    what is minimized: ln(time / anchor's time), or ln of bytes
    reason   why it is out of the question, or None
    """

    config: Config
    product: Product | None = None
    value: float | None = None
    reason: str | None = None
    quality: dict[str, Any] | None = None
    peak_rss_bytes: int | None = None
    rounds: int = 0


def value_of(trial: Trial) -> float:
    """What is minimized; infinity where it is not known."""
    return math.inf if trial.value is None else trial.value


def size_of(trial: Trial) -> int:
    """Bytes; 0 where nothing was built."""
    return trial.product.artifact.size_bytes if trial.product else 0


def family_of(config: Config) -> tuple[str, Path | None]:
    """What a configuration is a variation of."""
    return config.profile.name, config.recipe


def distinct(trials: Sequence[Trial], key: Callable[[Trial], str]) -> list[Trial]:
    """The trials without those that are the very same files and settings as an earlier one."""
    return list({key(trial): trial for trial in reversed(trials)}.values())[::-1]


def few_of_each(trials: Iterable[Trial], most: int) -> list[Trial]:
    """The trials, in their order, with at most so many variations of one target."""
    seen: Counter[tuple[str, Path | None]] = Counter()
    few = []
    for trial in trials:
        seen[family_of(trial.config)] += 1
        few += [trial] if seen[family_of(trial.config)] <= most else []
    return few

"""How long, how fast and in which way to train."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["cosine", "linear", "constant"]
Precision = Literal["fp32", "bf16", "fp16"]
Parallel = Literal["data", "sharded", "tensor", "sharded+tensor"]


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    epochs, steps           passes over the batches, and the most optimizer steps of all together
    learning_rate           the highest; "cosine" and "linear" fall to zero at the last step
    warmup_steps            steps in which the rate rises in equal parts to the highest
    clip_norm               largest L2 norm of all gradients together
    weight_decay            AdamW's, per unit of learning rate
    accumulate              batches whose gradients make one step, weighted by what each holds
    precision               of the products; weights and optimizer stay fp32
    gradient_checkpointing  run repeated blocks twice instead of keeping what is inside them: less memory, more time
    patience                epochs without a better one after which training ends with the best weights
    parallel                what several processes share: see `train.parallel`
    """

    epochs: int
    learning_rate: float
    steps: int | None = None
    shape: Shape = "cosine"
    clip_norm: float = 1.0
    weight_decay: float = 0.0
    seed: int = 0
    warmup_steps: int = 0
    accumulate: int = 1
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    patience: int | None = None
    parallel: Parallel = "data"


def learning_rate(schedule: Schedule, step: int, total: int) -> float:
    """The rate of step 0 .. total - 1; what falls starts at the full rate and would be zero at step `total`.

    Cosine: Loshchilov and Hutter, "SGDR", ICLR 2017, equation 5 without restarts.
    """
    warm = min(schedule.warmup_steps, total - 1)
    if step < warm:
        return schedule.learning_rate * (step + 1) / (warm + 1)
    gone = (step - warm) / (total - warm)
    falls = {"constant": 1.0, "linear": 1.0 - gone, "cosine": 0.5 * (1.0 + math.cos(math.pi * gone))}
    return schedule.learning_rate * falls[schedule.shape]

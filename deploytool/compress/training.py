"""Settings that every step that trains has in common."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from deploytool.compress.step import StepTable


class TrainingTable(StepTable):
    """How long, how fast and in which way a step trains.

    epochs, steps           passes over the training data, and the most optimizer steps of all passes together
    learning_rate           AdamW's, at its highest
    schedule                "cosine" and "linear" fall to zero at the end, "constant" stays
    warmup_steps            steps in which the rate rises to its highest
    weight_decay            AdamW's
    clip_norm               largest norm of all gradients together
    accumulate              batches that make one optimizer step
    precision               of the products: "fp32", "bf16" or "fp16"; the weights stay fp32
    gradient_checkpointing  run repeated blocks twice instead of keeping what is inside them: less memory, more time
    patience                epochs without a smaller loss after which training ends, with the best epoch's weights
    parallel                what the processes that torchrun started share: "data", "sharded", "tensor" or
                            "sharded+tensor"
    seed                    order of the batches and dropout; left out: the command's seed
    """

    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    gradient_checkpointing: bool = False
    patience: int | None = Field(default=None, ge=1)
    parallel: Literal["data", "sharded", "tensor", "sharded+tensor"] = "data"
    seed: int | None = Field(default=None, ge=0)

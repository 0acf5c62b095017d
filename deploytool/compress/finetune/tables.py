"""Settings of fine-tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from deploytool.compress.training import TrainingTable


class Finetune(TrainingTable):
    """Train the model with its own loss on its own training data; zeros and grids stay."""

    code: ClassVar[str] = "deploytool.compress.finetune.finetune"
    step: Literal["finetune"]

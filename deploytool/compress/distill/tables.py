"""Settings of the distillation steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deploytool.compress.step import StepTable

_Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(strict=False)]


class Distill(StepTable):
    """Train the compressed model to give what the original gives.

    output           the output or outputs to match; left out: "logits", or the only one
    match            "kl" for logits, "mse" or "cosine" for other outputs; left out: "kl" for "logits", else "mse"
    temperature      softens both distributions; for "kl" only (2 where left out)
    alpha            weight of the match, the model's own loss has 1 - alpha; left out: 0.5 with labels, 1 without
    epochs, steps    passes over the training data, and the most optimizer steps of all passes together
    learning_rate    AdamW's, at the start
    schedule         "cosine" falls to zero at the end, "constant" stays
    seed             order of the batches and dropout; left out: the command's seed
    """

    code: ClassVar[str] = "deploytool.compress.distill.temperature"
    step: Literal["distill"]
    output: _Names = ()
    match: Literal["kl", "mse", "cosine"] | None = None
    temperature: float | None = Field(default=None, gt=0, le=100)
    alpha: float | None = Field(default=None, ge=0, le=1)
    epochs: int = Field(default=1, ge=1)
    steps: int | None = Field(default=None, ge=1)
    learning_rate: float = Field(default=1e-4, gt=0, lt=1)
    schedule: Literal["cosine", "constant"] = "cosine"
    seed: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _temperature_is_for_kl(self) -> Self:
        if self.temperature is not None and self.match in ("mse", "cosine"):
            raise ValueError(f"temperature must be left out where match is {self.match!r}")
        return self

"""Settings of quantization-aware training."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from deploytool.compress.quantize.tables import Grid
from deploytool.compress.training import TrainingTable


class Qat(Grid, TrainingTable):
    """Train with weights on grids of few bits, and with inputs on grids of 8 where they are asked for.

    bits          of the weights
    group         input channels that share a scale, or "channel": one scale per output channel
    symmetric     no zero points: 0 is the middle code
    activations   bits of the layers' inputs, one scale per tensor, or "none"
    symmetric_activations   inputs without zero points, as TensorRT asks for: half of the codes are lost where inputs
                  have one sign
    ranges        "learned": scales are trained with the weights; "average": they follow the values, inputs by a moving
                  average
    towards       "labels": the model's own loss; "original": what the uncompressed model gives; "both"
    match         towards the original: "kl", "mse", or "tsld" for language models with few bits
    temperature   of "kl": softens both distributions
    token_temperature  of "tsld": how evenly tokens count
    """

    code: ClassVar[str] = "deploytool.compress.qat.qat"
    step: Literal["qat"]
    bits: int = Field(default=8, ge=2, le=8)
    group: Annotated[int, Field(ge=1)] | Literal["channel"] = "channel"
    symmetric: bool = True
    search: bool = True
    activations: Literal["none"] | Annotated[int, Field(ge=2, le=8)] = 8
    symmetric_activations: bool = False
    ranges: Literal["learned", "average"] = "learned"
    towards: Literal["labels", "original", "both"] | None = None
    match: Literal["kl", "tsld", "mse"] | None = None
    temperature: float = Field(default=2.0, gt=0, le=100)
    token_temperature: float = Field(default=10.0, gt=0)

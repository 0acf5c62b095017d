"""Settings of the distillation steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from deploytool.compress.step import StepTable
from deploytool.compress.training import TrainingTable

_Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(strict=False)]
_KL_ONLY = ("temperature", "temperature_end")


class Distill(TrainingTable):
    """Train the compressed model to give what the original gives.

    teacher          another MODEL to learn from; left out: the uncompressed original
    output           the output or outputs to match; left out: "logits", or the only one
    match            "kl" for logits, "mse" or "cosine" for other outputs, "tsld" for logits of language models with
                     low-bit weights; left out: "kl" for "logits", else "mse"
    temperature      softens both distributions; for "kl" only (2 where left out)
    temperature_end  where the temperature arrives at the last step, on a line
    temperature_floor  the lowest that the line reaches
    token_temperature  of "tsld": how evenly tokens count (10 where left out)
    alpha            weight of the match, the model's own loss has 1 - alpha; "tsld" adds both whole. Left out: 0.5 with
                     labels, 1 without
    hidden           {layer of the student = layer of the teacher} whose outputs become alike, or the name of a list of
                     blocks that both have: spread evenly over the teacher's
    hidden_weight    of the mean squared distance of those
    relations        {layer of the student = layer of the teacher} whose relations between tokens become alike
    relation_heads   parts that the width of those is cut into
    relation_weight  of the mean divergence of the relations
    cache            folder that keeps what the teacher gave, so that it runs once
    cache_top_k      keep only the largest of the last axis, and what the others come to
    """

    code: ClassVar[str] = "deploytool.compress.distill.distill"
    step: Literal["distill"]
    teacher: str | None = None
    output: _Names = ()
    match: Literal["kl", "mse", "cosine", "tsld"] | None = None
    temperature: float | None = Field(default=None, gt=0, le=100)
    temperature_end: float | None = Field(default=None, ge=0, le=100)
    temperature_floor: float = Field(default=0.5, gt=0, le=100)
    token_temperature: float = Field(default=10.0, gt=0)
    alpha: float | None = Field(default=None, ge=0, le=1)
    hidden: dict[str, str] | str = Field(default_factory=dict)
    hidden_weight: float = Field(default=1.0, gt=0)
    relations: dict[str, str] = Field(default_factory=dict)
    relation_heads: int = Field(default=4, ge=1)
    relation_weight: float = Field(default=1.0, gt=0)
    cache: str | None = Field(default=None, min_length=1)
    cache_top_k: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _what_belongs_together(self) -> Self:
        for key in _KL_ONLY:
            if getattr(self, key) is not None and self.match in ("mse", "cosine", "tsld"):
                raise ValueError(f"{key} must be left out where match is {self.match!r}")
        if self.match == "tsld" and self.alpha is not None:
            raise ValueError("alpha must be left out where match is 'tsld'")
        if self.cache is not None and (self.hidden or self.relations):
            raise ValueError("cache must be left out where hidden or relations need the teacher's inner layers")
        if self.cache_top_k is not None and (self.cache is None or self.match in ("mse", "cosine")):
            raise ValueError("cache_top_k needs a cache and logits to match")
        return self


class Narrow(StepTable):
    """Make a narrower student of the model: the units that count most stay, with their weights.

    heads, neurons, channels   the share of the attention heads, of the neurons between two linear layers, and of the
                               channels of convolutions that stays, above 0 and below 1; left out: all
    importance         which count most: as for `structured`
    include, exclude   names of the layers that make the units, `*` and `?` allowed; nothing included means all
    """

    code: ClassVar[str] = "deploytool.compress.distill.narrow"
    step: Literal["narrow"]
    heads: float | None = Field(default=None, gt=0, lt=1)
    neurons: float | None = Field(default=None, gt=0, lt=1)
    channels: float | None = Field(default=None, gt=0, lt=1)
    importance: Literal["reconstruction", "activation", "magnitude", "taylor"] = "reconstruction"
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _something(self) -> Self:
        if self.heads is self.neurons is self.channels is None:
            raise ValueError("at least one of heads, neurons and channels must be given")
        return self


class DropLayers(StepTable):
    """Make a shallower student of the model: some of a list of blocks stay, with their weights.

    blocks   the list's name, such as "blocks" or "encoder.layer"
    keep     how many stay, spread evenly, first and last included
    layers   or exactly which, counted from 0
    """

    code: ClassVar[str] = "deploytool.compress.distill.drop_layers"
    step: Literal["drop-layers"]
    blocks: str
    keep: int | None = Field(default=None, ge=1)
    layers: tuple[int, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.keep is None) == (not self.layers):
            raise ValueError("exactly one of keep and layers must be given")
        if self.layers and (list(self.layers) != sorted(set(self.layers)) or self.layers[0] < 0):
            raise ValueError(f"layers must rise from 0 or more (got {list(self.layers)})")
        return self

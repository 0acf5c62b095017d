"""Settings of the pruning steps."""

from __future__ import annotations

import re
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from deploytool.compress.step import StepTable
from deploytool.compress.training import TrainingTable
from deploytool.encoding import FEWEST_BITS, MOST_BITS
from deploytool.settings import Table


class Zeros(Table):
    """How many weights become zero, and in which layers; the base of the steps that keep every shape.

    sparsity           share of zeros, 0 to 1
    pattern            "N:M" keeps N weights of every M neighbours in a row, such as "2:4"; the share of zeros follows
    include, exclude   layer names, `*` and `?` allowed; nothing included means every layer
    """

    sparsity: float | None = Field(default=None, ge=0, lt=1)
    pattern: str | None = None
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_share(self) -> Self:
        if self.pattern is None:
            if self.sparsity is None:
                raise ValueError("one of sparsity and pattern must be given")
            return self
        kept = self.kept_of
        if kept is None:
            raise ValueError(f'pattern must be "N:M" with 0 < N < M <= 64, such as "2:4", not {self.pattern!r}')
        if self.sparsity is not None and abs(self.sparsity - (1 - kept[0] / kept[1])) > 1e-9:
            raise ValueError(f"sparsity must be left out, or {1 - kept[0] / kept[1]:g} as pattern {self.pattern} says")
        return self

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None without one, or when it is not well formed."""
        match = re.fullmatch(r"(\d{1,2}):(\d{1,2})", self.pattern or "")
        kept = (int(match[1]), int(match[2])) if match else (0, 0)
        return kept if 0 < kept[0] < kept[1] <= 64 else None

    @property
    def share(self) -> float:
        """The share of zeros, 0 to 1."""
        kept = self.kept_of
        return 1 - kept[0] / kept[1] if kept else float(self.sparsity or 0)


class Magnitude(Zeros, StepTable):
    """Set the smallest weights to zero.

    sparsity           share of zeros, 0 to 1
    pattern            "N:M" keeps the N largest of every M neighbours in a row
    scope              "tensor": that share of every weight; "global": of all chosen weights together
    include, exclude   layer names, `*` and `?` allowed; nothing included means every layer
    """

    code: ClassVar[str] = "deploytool.compress.prune.magnitude"
    step: Literal["magnitude"]
    scope: Literal["tensor", "global"] = "tensor"

    @model_validator(mode="after")
    def _pattern_is_local(self) -> Self:
        if self.pattern is not None and self.scope == "global":
            raise ValueError('scope must be "tensor" where a pattern is given')
        return self


class Wanda(Zeros, StepTable):
    """Set to zero, in every row, the weights whose magnitude times the norm of their input is smallest.

    sparsity           share of zeros of every row, 0 to 1
    pattern            "N:M" keeps N of every M neighbours in a row
    include, exclude   layer names, `*` and `?` allowed; nothing included means every linear layer and convolution
    """

    code: ClassVar[str] = "deploytool.compress.prune.wanda"
    step: Literal["wanda"]


class SparseGpt(Zeros, StepTable):
    """Set weights to zero column by column; what a column loses, the columns after it make good on the samples.

    The weights that are kept are then fitted once more by least squares, all together.

    sparsity           share of zeros of every layer, 0 to 1
    pattern            "N:M" keeps N of every M neighbours in a row
    block              columns among which the share of zeros is exact, and which are updated together
    repair             work towards what the uncompressed model gives, not only towards the layer's own outputs: each
                       layer makes good for what the pruned ones before it changed
    bits               round what is kept to a grid of so many bits in the same pass, and fit nothing after it; left
                       out: no grid
    group              neighbours in a row that share the grid's scale and zero point
    damping            added to the diagonal of the inputs' second moments, as a share of its mean; ten times as much
                       each time that it proves too little
    include, exclude   layer names, `*` and `?` allowed; nothing included means every linear layer and convolution
    """

    code: ClassVar[str] = "deploytool.compress.prune.sparsegpt"
    step: Literal["sparsegpt"]
    block: int = Field(default=128, ge=1)
    repair: bool = False
    bits: int | None = Field(default=None, ge=FEWEST_BITS, le=MOST_BITS)
    group: int = Field(default=64, ge=1)
    damping: float = Field(default=0.1, gt=0, le=1)


class Structured(StepTable):
    """Take whole units out: attention heads, neurons, convolution channels. Layers really get smaller.

    remove             share of the units, 0 to 1: of every group of layers, or of all weights with scope "global"
    scope              "layer": the same share everywhere; "global": units go where they matter least, until that share
                       of the weights that can be removed is gone
    units              which kinds: "heads", "neurons", "channels"; left out: all
    importance         "reconstruction": the least loss once the rest has made good for it; "activation": the strength
                       of what a unit adds; "magnitude": of its weights; "taylor": of its first-order effect on the loss
    weigh              errors of what layers give count "alike", or by how much the model's "outputs" change with them,
                       which takes backward passes; of importance "reconstruction" and of reconstruct, else refused
    output             names of the outputs that errors are weighed by; left out: all
    reconstruct        fit the layers that make and read the units to the uncompressed model's outputs, in closed form
    damping            weight of staying as it was, as a share of the mean square of the inputs; left out: what serves
                       best on a quarter of the samples that the fit has not seen
    include, exclude   names of the layers that make the units, `*` and `?` allowed; nothing included means all
    """

    code: ClassVar[str] = "deploytool.compress.prune.structured"
    step: Literal["structured"]
    remove: float = Field(gt=0, lt=1)
    scope: Literal["layer", "global"] = "layer"
    units: tuple[Literal["heads", "neurons", "channels"], ...] = Field(default=(), strict=False)
    importance: Literal["reconstruction", "activation", "magnitude", "taylor"] = "reconstruction"
    weigh: Literal["alike", "outputs"] = "alike"
    output: tuple[str, ...] = Field(default=(), strict=False)
    reconstruct: bool = True
    damping: float | None = Field(default=None, gt=0, le=100)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _weighed_by(self) -> Self:
        if self.output and self.weigh == "alike":
            raise ValueError('output must be left out where weigh is "alike"')
        if self.weigh == "outputs" and self.importance != "reconstruction" and not self.reconstruct:
            raise ValueError('weigh must be "alike" where nothing is fitted, by importance or by reconstruct')
        return self


class Progressive(TrainingTable):
    """Prune in rounds, a little more each time, and train in between: the same zeros for less loss than at once.

    method             what prunes: "magnitude", "wanda" or "sparsegpt"
    sparsity           share of zeros after the last round, 0 to 1
    rounds             how many prunings, each followed by a training of `epochs` or `steps`
    growth             of the share over the rounds: "cubic" takes much at first and little at the end, "linear" evenly
    start              share of zeros before the first round
    train              "distill": towards the uncompressed model; "finetune": with the model's own loss
    include, exclude   layer names, `*` and `?` allowed; nothing included means every layer
    """

    code: ClassVar[str] = "deploytool.compress.prune.progressive"
    step: Literal["progressive"]
    method: Literal["magnitude", "wanda", "sparsegpt"] = "magnitude"
    sparsity: float = Field(gt=0, lt=1)
    rounds: int = Field(default=4, ge=2, le=100)
    growth: Literal["cubic", "linear"] = "cubic"
    start: float = Field(default=0.0, ge=0, lt=1)
    train: Literal["distill", "finetune"] = "distill"
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _grows(self) -> Self:
        if self.start >= self.sparsity:
            raise ValueError(f"start must be below sparsity {self.sparsity:g}, not {self.start:g}")
        return self

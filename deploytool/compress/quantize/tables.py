"""Settings of the quantization steps."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from deploytool.compress.step import StepTable
from deploytool.encoding import FEWEST_BITS, MOST_BITS
from deploytool.settings import Table

_Group = Annotated[int, Field(ge=1)]


class Layers(Table):
    """The layers that are quantized, and all of their grid but the bits.

    group              input channels that share a scale, or "channel": one scale per output channel. A width that the
                       group does not divide has a shorter last group
    symmetric          no zero points: 0 is the middle code
    search             look for the range with the least squared error, not only from extreme to extreme
    include, exclude   layer names, `*` and `?` allowed; nothing included means every linear and convolution layer
    """

    group: _Group | Literal["channel"] = 64
    symmetric: bool = False
    search: bool = False
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)


class Grid(Layers):
    """The grid of all weights: `bits` 2 to 8 for each."""

    bits: int = Field(default=4, ge=FEWEST_BITS, le=MOST_BITS)


class Rtn(Grid, StepTable):
    """Round every weight to the nearest value of its grid; no data is looked at.

    group   also "found": the grid of at most `bits` bits on which weights already lie, kept without loss
    """

    code: ClassVar[str] = "deploytool.compress.quantize.rtn"
    step: Literal["rtn"]
    group: _Group | Literal["channel", "found"] = 64  # type: ignore[assignment]


class Gptq(Grid, StepTable):
    """Round column by column; what a column loses, the columns after it make good on the calibration samples.

    order           "activation": the inputs that are strongest on the samples first; "given": as they stand
    static_groups   every group's grid is chosen before anything is rounded, not when its first column is reached;
                    always so with order "activation", whose groups are not reached one after the other
    damping         added to the diagonal of the inputs' second moments, as a share of its mean
    """

    code: ClassVar[str] = "deploytool.compress.quantize.gptq"
    step: Literal["gptq"]
    order: Literal["activation", "given"] = "activation"
    static_groups: bool = True
    damping: float = Field(default=0.01, gt=0, le=1)


class Awq(Grid, StepTable):
    """Scale the inputs that are strong on the calibration samples up before rounding, and what makes them down.

    search      here the range is searched that changes the layer's outputs least, from extreme to extreme when false
    exponents   how many exponents from 0 to 1 are tried for every tensor that linear layers read
    round       false only scales: another step rounds
    """

    code: ClassVar[str] = "deploytool.compress.quantize.awq"
    step: Literal["awq"]
    search: bool = True
    exponents: int = Field(default=11, ge=2, le=101)
    round: bool = True


class SmoothQuant(StepTable):
    """Move the range of activations into the weights that read them, so that both fit eight bits.

    alpha              how much of it: 0 leaves the activations' ranges, 1 makes them all equal
    include, exclude   layer names, `*` and `?` allowed; nothing included means every linear layer
    """

    code: ClassVar[str] = "deploytool.compress.quantize.smoothquant"
    step: Literal["smoothquant"]
    alpha: float = Field(default=0.5, ge=0, le=1)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)


class MixedPrecision(Layers, StepTable):
    """Give every layer the bits that it needs most, out of one budget, and quantize it.

    mean_bits   the budget: bits per weight of all chosen layers together, scales and zero points included
    choices     the widths that a layer may get
    method      what rounds: "gptq" or "rtn"
    """

    code: ClassVar[str] = "deploytool.compress.quantize.mixed"
    step: Literal["mixed-precision"]
    mean_bits: float = Field(gt=FEWEST_BITS, le=MOST_BITS + 8)
    choices: tuple[Annotated[int, Field(ge=FEWEST_BITS, le=MOST_BITS)], ...] = Field(default=(3, 4, 8), strict=False,
                                                                                     min_length=2)  # fmt: skip
    method: Literal["gptq", "rtn"] = "gptq"

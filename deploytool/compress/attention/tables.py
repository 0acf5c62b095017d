"""Settings of the steps that replace attention."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deploytool.compress.step import StepTable


class PlainAttention(StepTable):
    """Replace torch's fused attention modules by equal ones of plain linears, which later steps and quantizers reach.

    include, exclude   layer names, `*` and `?` allowed; nothing included means every fused module
    """

    code: ClassVar[str] = "deploytool.compress.attention.plain"
    step: Literal["plain-attention"]
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)


class BlockwiseAttention(StepTable):
    """Compute exact attention block by block, so that memory does not grow with the square of the length.

    block              tokens of a block
    include, exclude   modules that compute attention, `*` and `?` allowed; nothing included means all
    """

    code: ClassVar[str] = "deploytool.compress.attention.routed"
    step: Literal["blockwise-attention"]
    block: int = Field(default=512, ge=1)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)


class LocalAttention(StepTable):
    """Let each token see its neighbours only, and compute nothing else; time then grows with the length.

    window             how far a token sees to either side, in tokens
    stride             besides, every stride-th block of `window` tokens; 0: none
    global_tokens      how many first tokens see and are seen by all
    include, exclude   modules that compute attention, `*` and `?` allowed; nothing included means all
    """

    code: ClassVar[str] = "deploytool.compress.attention.routed"
    step: Literal["local-attention"]
    window: int = Field(ge=1)
    stride: int = Field(default=0, ge=0)
    global_tokens: int = Field(default=0, ge=0)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)


class Fnet(StepTable):
    """Replace attention, its projections included, by Fourier mixing, which has no weights; distill after it.

    include, exclude   modules that compute attention, `*` and `?` allowed; nothing included means all
    """

    code: ClassVar[str] = "deploytool.compress.attention.fnet"
    step: Literal["fnet"]
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

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

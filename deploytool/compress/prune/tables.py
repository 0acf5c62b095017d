"""Settings of the pruning steps."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from deploytool.compress.step import StepTable


class Magnitude(StepTable):
    """Set the smallest weights to zero.

    sparsity           share of zeros, 0 to 1
    scope              "tensor": that share of every weight; "global": of all chosen weights together
    include, exclude   layer names, `*` and `?` allowed; nothing included means every layer
    """

    code: ClassVar[str] = "deploytool.compress.prune.magnitude"
    step: Literal["magnitude"]
    sparsity: float = Field(ge=0, lt=1)
    scope: Literal["tensor", "global"] = "tensor"
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

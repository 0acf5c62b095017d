"""Settings of the factorization steps."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from deploytool.compress.step import StepTable


class Svd(StepTable):
    """Replace linear layers by two thinner ones. Exactly one of `rank`, `energy`, `keep`, `budget` must be given.

    rank               the width between the two
    energy             the least share of the squared singular values that must remain, 0 to 1
    keep               the share of each layer's weights that may remain, 0 to 1
    budget             the share of all chosen layers' weights together, given out by what the outputs lose
    whiten             keep what changes the layer's outputs on the calibration samples least, not its weights
    reconstruct        fit each pair to the outputs before, with the inputs that the factored layers before it now give
    damping            added to the diagonal of the inputs' Gram matrix, as a share of its mean; with `whiten`
    include, exclude   layer names, `*` and `?` allowed; nothing included means every linear layer
    """

    code: ClassVar[str] = "deploytool.compress.factorize.svd"
    step: Literal["svd"]
    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    keep: float | None = Field(default=None, gt=0, lt=1)
    budget: float | None = Field(default=None, gt=0, lt=1)
    whiten: bool = False
    reconstruct: bool = False
    damping: float = Field(default=0.01, gt=0, le=1)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        names = ("rank", "energy", "keep", "budget")
        given = [name for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"exactly one of {', '.join(names)} must be given, not {' and '.join(given) or 'none'}")
        if self.reconstruct and not self.whiten:
            raise ValueError("reconstruct needs whiten = true")
        return self


class Tucker(StepTable):
    """Replace a convolution by three: fewer channels in, the kernel, more channels out. One of `keep`, `energy`.

    keep               the share of each kernel's weights that may remain, 0 to 1
    energy             the least share of the squared singular values that must remain, in both directions, 0 to 1
    include, exclude   layer names, `*` and `?` allowed; nothing included means every convolution
    """

    code: ClassVar[str] = "deploytool.compress.factorize.tucker"
    step: Literal["tucker"]
    keep: float | None = Field(default=None, gt=0, lt=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.keep is None) == (self.energy is None):
            raise ValueError("exactly one of keep and energy must be given")
        return self


class LowRankEmbedding(StepTable):
    """Replace an embedding by a thinner one and a linear layer. Exactly one of `rank`, `energy`, `keep`.

    rank               the width of the thinner one
    energy             the least share of the squared singular values that must remain, 0 to 1
    keep               the share of the table's weights that may remain, 0 to 1
    include, exclude   layer names, `*` and `?` allowed; nothing included means every embedding
    """

    code: ClassVar[str] = "deploytool.compress.factorize.embedding"
    step: Literal["low-rank-embedding"]
    rank: int | None = Field(default=None, ge=1)
    energy: float | None = Field(default=None, gt=0, le=1)
    keep: float | None = Field(default=None, gt=0, lt=1)
    include: tuple[str, ...] = Field(default=(), strict=False)
    exclude: tuple[str, ...] = Field(default=(), strict=False)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if sum(value is not None for value in (self.rank, self.energy, self.keep)) != 1:
            raise ValueError("exactly one of rank, energy and keep must be given")
        return self

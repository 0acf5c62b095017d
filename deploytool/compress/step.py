"""What every compression step is: a table of settings, and a file whose `apply` does the work.

Adding an algorithm: its file with

    def apply(source: Source, settings: ITS_TABLE, context: Context) -> tuple[Source, dict[str, Any]]

and its table in the family's light `tables.py`, so that recipes are checked and planned without importing torch.
`apply` never changes the source that it is given; the dict is data for the report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from pydantic import Field

from deploytool.settings import Table
from deploytool.source import Source

if TYPE_CHECKING:
    from torch import Tensor

Progress = Callable[[str], None]
_SEQUENCE = "sequence"


class StepTable(Table):
    """Base of a step's settings. `step` is a Literal with the step's name; `code` is the module that has `apply`."""

    code: ClassVar[str]
    step: str

    @classmethod
    def step_name(cls) -> str:
        """The name that stands in recipes."""
        return str(get_args(cls.model_fields["step"].annotation)[0])


class Calibration(Table):
    """How many of the model's samples a step may look at, and where dimension "sequence" is cut, in tokens.

    precision  of the matrix products of `gptq` and `sparsegpt`: what the samples give in the model; "auto" is bfloat16
               on processors that compute in it, which is faster and a little worse
    """

    samples: int = Field(default=128, ge=1)
    length: int | None = Field(default=None, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "float32"


class Training(Table):
    """What all steps that train share.

    checkpoints   folder that keeps how far each step is: the same command goes on from there after a crash
    every_steps   optimizer steps between two checkpoints
    """

    checkpoints: str | None = Field(default=None, min_length=1)
    every_steps: int = Field(default=200, ge=1)


@dataclass(frozen=True)
class Context:
    """What a step may use besides its settings.

    original      the uncompressed source: the teacher of steps that train
    calibration   the recipe's [calibration]
    seed          every random choice of a step follows from it
    progress      takes one line of text at a time
    checkpoints   the step's folder for checkpoints of training, None where none are kept
    checkpoint_every  optimizer steps between two of them
    """

    original: Source
    calibration: Calibration
    seed: int
    progress: Progress
    checkpoints: Path | None = None
    checkpoint_every: int = 200

    def samples(self, source: Source) -> Sequence[dict[str, Tensor]]:
        """The first `calibration.samples` of a source, cut to `calibration.length` along "sequence".

        They are what its `calibration()` gives, and its samples where it has none. They are read once, one by one, and
        memory holds few of them.
        """
        from deploytool.compress.shelf import Shelf  # recipes are checked and planned without importing torch

        given = source.samples if source.calibration is None else source.calibration
        count, length = self.calibration.samples, self.calibration.length
        taken = islice(given(), count)
        return Shelf(taken if length is None else (_cut(source, sample, length) for sample in taken), expected=count)


def _cut(source: Source, sample: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    cut = dict(sample)
    for spec in source.signature.inputs:
        if _SEQUENCE in spec.shape:
            axis = spec.shape.index(_SEQUENCE)
            value = sample[spec.name]
            cut[spec.name] = value.narrow(axis, 0, min(length, value.shape[axis]))
    return cut

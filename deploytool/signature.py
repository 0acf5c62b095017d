"""What a model takes and gives: names, types and shapes, with named free dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from deploytool.errors import InputRefused, nearest

Dim = int | str
Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `dtype` is NumPy's name; a free dimension is a name, a fixed one a number."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        return cls(data["name"], data["dtype"], tuple(data["shape"]))

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in their order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __str__(self) -> str:
        return " -> ".join(", ".join(map(str, specs)) or "nothing" for specs in (self.inputs, self.outputs))

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the free input dimensions, in order of appearance."""
        return tuple(dict.fromkeys(d for spec in self.inputs for d in spec.shape if isinstance(d, str)))

    @property
    def input_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.outputs)

    def to_json(self) -> dict[str, Any]:
        return {"inputs": [s.to_json() for s in self.inputs], "outputs": [s.to_json() for s in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Signature:
        return cls(
            tuple(TensorSpec.from_json(s) for s in data["inputs"]),
            tuple(TensorSpec.from_json(s) for s in data["outputs"]),
        )

    def bind(self, feeds: Feeds) -> dict[str, int]:
        """Sizes of the free dimensions in `feeds`; raises InputRefused when the feeds do not fit."""
        _check_names(self.input_names, feeds)
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            array = feeds[spec.name]
            if array.dtype.name != spec.dtype:
                raise InputRefused("DT308", f"input {spec.name!r} must be {spec.dtype} (got {array.dtype.name})")
            if array.ndim != len(spec.shape):
                raise InputRefused("DT308", f"input {spec.name!r} must have shape {list(spec.shape)} "
                                            f"(got {list(array.shape)})")  # fmt: skip
            for axis, (dim, size) in enumerate(zip(spec.shape, array.shape, strict=True)):
                expected = dim if isinstance(dim, int) else sizes.setdefault(dim, size)
                if expected != size:
                    raise self._wrong_size(spec, axis, expected, array)
        return sizes

    def _wrong_size(self, spec: TensorSpec, axis: int, expected: int, array: np.ndarray) -> InputRefused:
        dim, must = spec.shape[axis], f"axis {axis} of input {spec.name!r} must have"
        if isinstance(dim, int):
            must += f" the fixed size {dim}"
            fix = f"give size {dim} there, or export again with that axis free: name it in INPUTS"
        else:
            first = next(other for other in self.inputs if dim in other.shape)
            must += f" size {expected}, as axis {first.shape.index(dim)} of input {first.name!r} has: both are {dim!r}"
            fix = f"give all inputs the same size of {dim!r}"
        detail = [f"the input: {spec}", f"got: {list(array.shape)}"]
        return InputRefused("DT308", f"{must} (got {array.shape[axis]})", detail=detail, fix=fix)


def _check_names(known: tuple[str, ...], feeds: Feeds) -> None:
    missing = [name for name in known if name not in feeds]
    unknown = [name for name in feeds if name not in known]
    if missing or unknown:
        detail = [f"missing: {name}" for name in missing]
        detail += [f"unknown: {name}; {nearest(name, known)}" for name in unknown]
        raise InputRefused("DT308", f"the feeds must be named {', '.join(known)} (got {', '.join(feeds) or 'none'})",
                           detail=detail)  # fmt: skip

"""At which sizes an artifact was compared, and what its cases did not show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploytool.cases import Case
from deploytool.signature import Signature


@dataclass
class Seen:
    """Sizes of the free dimensions, and how many cases have padding (zeros in a mask among the inputs)."""

    signature: Signature
    sizes: dict[str, set[int]] = field(default_factory=dict)
    padded: int = 0

    def add(self, case: Case) -> None:
        for dim, size in self.signature.bind(case.inputs).items():
            self.sizes.setdefault(dim, set()).add(size)
        self.padded += any("mask" in name and array.dtype.kind in "biu" and bool((array == 0).any())
                           for name, array in case.inputs.items())  # fmt: skip

    def summary(self) -> dict[str, Any]:
        """As JSON data: {"sizes": {dimension: [size, ...]}, "padded": cases}."""
        return {"sizes": {dim: sorted(seen) for dim, seen in self.sizes.items()}, "padded": self.padded}


def unseen(parity: Mapping[str, Any], inputs: Sequence[str]) -> list[str]:
    """What the cases did not show, one sentence each: sizes of 1, 2 and odd ones, padding where there is a mask."""
    said = []
    for dim, seen in parity["sizes"].items():
        kinds = {"1": 1 in seen, "2": 2 in seen, "a larger odd one": any(size % 2 and size > 1 for size in seen)}
        if missing := [word for word, there in kinds.items() if not there]:
            said.append(f"{dim} was compared at {', '.join(map(str, seen))}: not at {', '.join(missing)}")
    if not parity["padded"] and any("mask" in name for name in inputs):
        said.append("no case has padding: that the mask is heeded is not shown")
    return said

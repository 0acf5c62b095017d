"""Whether int8 products can saturate, told from the weights alone.

x86 CPUs without VNNI multiply unsigned activations by signed weights with `vpmaddubsw`: two neighbours' products along
the inner dimension are added in 16 bits, and what does not fit is cut off. Activations of 0 to 255 reach the largest
sum where they are 255 at the weights of one sign and 0 at the others, so that the weights alone bound it.

Which products are neighbours is for the kernel's packing. Taken here is that of ONNX Runtime's MLAS
(onnxruntime/core/mlas/lib/qgemm_kernel_avx2.cpp: PackedK = 4, and amd64/QgemmU8S8KernelAvx2.asm): rows k to k+3 of the
weight lie side by side in each column, so rows k and k+1 of an even k are added. All neighbours are looked at here, of
an odd k too. A convolution's inner dimension has the channels last where its input has, else first: both are looked at.
A kernel that packs otherwise is not covered; weights of 7 bits cannot saturate in any packing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

LOWEST, HIGHEST = -(2**15), 2**15 - 1  # what 16 bits hold
_ACTIVATION = 255
_AT_ONCE = 256  # outputs, so that wide copies of large weights stay small


@dataclass(frozen=True)
class PairSums:
    """The lowest and the highest sum of two neighbouring products that any activations can give."""

    lowest: int
    highest: int

    @property
    def excess(self) -> int:
        """By how much the worse of the two lies outside 16 bits; 0 where nothing can saturate."""
        return max(self.highest - HIGHEST, LOWEST - self.lowest, 0)

    @property
    def can_saturate(self) -> bool:
        return self.excess > 0


def pair_sums(codes: np.ndarray, axis: int) -> PairSums:
    """Of a product's int8 weight, whose outputs count along `axis`; the other axes are the inner dimension.

    MatMul: [in, out] with axis 1. Conv: [out, in, *kernel] with axis 0.
    """
    outputs = np.moveaxis(codes, axis, 0)
    lowest = highest = 0
    for start in range(0, len(outputs), _AT_ONCE):
        wide = outputs[start : start + _AT_ONCE].astype(np.int16)
        for order in (wide,) if wide.ndim < 3 else (wide, np.moveaxis(wide, 1, -1)):
            rows = order.reshape(len(order), -1)
            lowest, highest = max(lowest, _largest(-rows)), max(highest, _largest(rows))
    return PairSums(-_ACTIVATION * lowest, _ACTIVATION * highest)


def counted(weights: Iterable[tuple[str, np.ndarray, int]]) -> dict[str, Any]:
    """What an artifact's settings say as `can_saturate`, of (name, codes, axis) of every int8 weight.

    The count of those that can, of how many, and of the worst its name and by how much it exceeds 16 bits.
    """
    excess = {name: pair_sums(codes, axis).excess for name, codes, axis in weights}
    worst = max(excess, key=lambda name: excess[name], default="")
    found = sum(value > 0 for value in excess.values())
    return {"weights": found, "of": len(excess)} | ({"worst": worst, "excess": excess[worst]} if found else {})


def has_vnni(cpu_flags: Collection[str]) -> bool:
    """Whether a CPU with these flags multiplies bytes without adding in 16 bits."""
    return bool({"avx512_vnni", "avx_vnni"} & set(cpu_flags))


def told(settings: Mapping[str, Any], cpu_flags: Collection[str]) -> list[str]:
    """What a report has to say of an artifact with these settings; nothing where nothing can saturate.

    `cpu_flags` are those of the machine that the report is made on.
    """
    found = settings.get("can_saturate", {"weights": 0})
    if not found["weights"]:
        return []
    here = "has it" if has_vnni(cpu_flags) else "has none"
    return [f"{found['weights']} of {found['of']} int8 weights can saturate on x86 CPUs without VNNI (that of this "
            f"machine {here}) where ONNX Runtime is opened without session.x64quantprecision, which deploytool sets "
            f"(worst: {found['worst']}, by up to {found['excess']} in a sum of 16 bits)"]  # fmt: skip


def _largest(rows: np.ndarray) -> int:
    """The largest sum of the positive parts of two neighbours in a row; int16 [outputs, inner]."""
    positive = np.pad(np.maximum(rows, 0), ((0, 0), (0, 1)))  # the last of a row may have a 0 beside it
    return int((positive[:, :-1] + positive[:, 1:]).max(initial=0))

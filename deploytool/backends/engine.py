"""What all opened engines share: feeds are checked, outputs are named and owned by the caller."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import numpy as np
import psutil

from deploytool.artifact import Artifact
from deploytool.errors import BackendFailed
from deploytool.signature import Feeds, Outputs, Signature


class EngineRunner(ABC):
    """A Runner whose engine gives its outputs in the order of the signature."""

    def __init__(self, signature: Signature) -> None:
        self.signature = signature

    @abstractmethod
    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """Run the engine on checked feeds; the arrays may be the engine's own memory."""

    def close(self) -> None:  # noqa: B027 - most engines are freed with the object
        """Free the engine."""

    def run(self, feeds: Feeds) -> Outputs:
        """Named outputs as copies of their own; raises InputRefused for wrong feeds, BackendFailed for a bad engine."""
        self.signature.bind(feeds)
        arrays = self.infer(feeds)
        specs = self.signature.outputs
        if len(arrays) != len(specs):
            raise BackendFailed("DT504", f"the engine must give {len(specs)} outputs (got {len(arrays)})")
        outputs = {}
        for spec, array in zip(specs, arrays, strict=True):
            if array.dtype.name != spec.dtype:
                raise BackendFailed("DT504", f"output {spec.name!r} must be {spec.dtype} (got {array.dtype.name})")
            outputs[spec.name] = np.array(array, copy=True, order="C")
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def threads_of(artifact: Artifact) -> int:
    """Threads to run an artifact with: its setting, or for 0 the physical cores that this process may use."""
    return threads_to_use(int(artifact.settings.get("threads", 0)))


def threads_to_use(wanted: int) -> int:
    """`wanted`, or for 0 the physical cores that this process may use."""
    if wanted:
        return wanted
    usable = len(os.sched_getaffinity(0))
    return max(1, min(psutil.cpu_count(logical=False) or usable, usable))

"""What one machine of a search does: it builds, evaluates and times, one piece of work after the other."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.backends.base import find_backend
from deploytool.bench.energy import MachineMeter
from deploytool.bench.environment import environment
from deploytool.cache import Prepared
from deploytool.pipeline.reference import Reference
from deploytool.source import ModelRef
from deploytool.storage import new_folder
from deploytool.target import Target
from deploytool.tune.track import Entrant, Track, short
from deploytool.worker import Limits

_SLOT_SECONDS = 0.1
_LIVES = 3  # processes of an entrant in a race, where its runs are short


@dataclass(frozen=True)
class Terms:
    """What is the same for every piece of work of a search.

    folder    where what is dropped afterwards lies meanwhile
    cases     the inputs that are timed, one per bucket
    energy    whether energy is measured beside time
    quality   whether task metrics are evaluated
    """

    folder: Path
    cases: tuple[Path, ...]
    limits: Limits
    seed: int
    quality: bool = True
    energy: bool = False


class Station:
    """The pieces of work, each a method; a context manager. Raises EnvironmentLacking where energy cannot be read."""

    def __init__(self, terms: Terms):
        self._terms = terms
        self._meter = MachineMeter() if terms.energy else None
        self._references: dict[tuple[ModelRef, Path], Reference] = {}
        self._stack = ExitStack()
        self._track = self._stack.enter_context(Track(terms.cases, _SLOT_SECONDS, terms.limits, self._meter))

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def build(self, ref: ModelRef, prepared: Prepared, target: Target, folder: Path) -> dict[str, Any]:
        """Build a target into `folder` and compare it with the reference: "parity", and "seconds" of both."""
        reference, started = self._reference(ref, prepared), time.perf_counter()
        with new_folder(folder, overwrite=True) as made, reference.engine(target) as engine:
            artifact = reference.build(target, made, engine)
            built = time.perf_counter()
            parity = reference.parity(artifact, engine)
            artifact.save(known=artifact.files)
        return {"parity": parity, "seconds": {"build": built - started, "verify": time.perf_counter() - built}}

    def evaluate(self, ref: ModelRef, prepared: Prepared, artifact: Artifact) -> dict[str, Any]:
        """Task metrics and decoding of an artifact; where there are none, what a recipe cost in the outputs."""
        reference = self._reference(ref, prepared)
        quality, generation = reference.quality_of(artifact, self._terms.quality)
        compression = None if quality else reference.compression(artifact)
        return {"quality": quality, "generation": generation, "compression": compression}

    def race(self, entrant: Entrant, anchor: Entrant, count: int, seed: Sequence[int]) -> dict[str, Any]:
        """So many rounds of an entrant with the anchor, and the most memory that the entrant's process held."""
        both = [anchor] if anchor.key == entrant.key else [anchor, entrant]
        rng = np.random.default_rng(list(seed))
        try:
            rounds: list[dict[str, Any]] = []
            for number in range(count):
                if rounds and number % max(1, count // _LIVES) == 0 and short(rounds, entrant.key):
                    self._track.close(entrant.key)
                rounds.append(self._track.round(both, rng))
            return {"rounds": rounds, "peak_rss_bytes": self._track.peak_rss_bytes(entrant)}
        finally:
            if entrant.key != anchor.key:
                self._track.close(entrant.key)

    def round(self, members: Sequence[Entrant], seed: Sequence[int], *, fresh: bool = False) -> dict[str, Any]:
        """One round of all members, `fresh` in processes of its own."""
        if fresh:
            self._track.clear()
        return self._track.round(members, np.random.default_rng(list(seed)))

    def clear(self) -> None:
        """End every process; what is timed next is opened anew."""
        self._track.clear()

    def _reference(self, ref: ModelRef, prepared: Prepared) -> Reference:
        key = ref, prepared.folder
        if key not in self._references:
            work = self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".work-", dir=self._terms.folder))
            self._references[key] = Reference(ref, prepared, Path(work), self._terms.limits, self._terms.seed)
        return self._references[key]


def machine() -> dict[str, Any]:
    """What timings depend on: figures of machines for which this is equal stand beside each other."""
    about = environment()
    return {key: about[key] for key in ("cpu", "cpu_flags", "cores_usable", "packages")}


def takes_graph(target: Target) -> bool:
    """Whether a target is built from the ONNX graph."""
    return find_backend(target.backend).accepts == "onnx"

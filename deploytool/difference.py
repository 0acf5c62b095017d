"""How far one output is from its reference: errors added up over cases, one output at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SQNR_CAP_DB = 300.0  # equal arrays have infinite SQNR, which JSON cannot hold


@dataclass
class Difference:
    """Errors of one output, accumulated over cases.

    Worst-sample figures (`cosine`, and `error`: L2 norm of the difference over the reference's norm, floating-point
    outputs only) look at one row of the batch at a time where axis 0 is the batch, else at the whole array.
    Elements that are the same infinity in both are equal and left out; any other non-finite element is a failure.
    """

    name: str
    batched: bool
    elements: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    cosine: float = 1.0
    error: float = 0.0
    worst_sample: str = ""
    signal: float = 0.0
    noise: float = 0.0
    decisions: int = 0
    agreed: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, case: int, reference: np.ndarray | None, candidate: np.ndarray | None) -> None:
        """Compare one case; one that is missing on either side, misshapen or not finite is recorded as a problem."""
        if reference is None:
            self.problems.append(f"case {case}: the reference has no such output")
        elif candidate is None:
            self.problems.append(f"case {case}: the output is missing")
        elif candidate.shape != reference.shape:
            self.problems.append(f"case {case}: shape must be {list(reference.shape)} (got {list(candidate.shape)})")
        elif candidate.dtype != reference.dtype:
            self.problems.append(f"case {case}: type must be {reference.dtype} (got {candidate.dtype})")
        elif reference.size:
            self._compare(case, reference, candidate)

    def _compare(self, case: int, reference: np.ndarray, candidate: np.ndarray) -> None:
        same_infinity = np.isinf(reference) & (reference == candidate) if reference.dtype.kind == "f" else None
        ref, got = reference.astype(np.float64), candidate.astype(np.float64)
        if same_infinity is not None and same_infinity.any():
            ref, got = np.where(same_infinity, 0.0, ref), np.where(same_infinity, 0.0, got)
        bad = int((~(np.isfinite(got) & np.isfinite(ref))).sum())
        if bad:
            self.problems.append(f"case {case}: {bad} of {got.size} elements are not finite in one or both")
            return
        error = np.abs(got - ref)
        self.elements += ref.size
        self.max_abs = max(self.max_abs, float(error.max()))
        self.sum_abs += float(error.sum())
        with np.errstate(over="ignore"):  # what is too large to square is judged in _sqnr_db
            self.signal += float((ref * ref).sum())
            self.noise += float((error * error).sum())
        self._worst(case, ref, got, reference.dtype.kind == "f")
        self._decide(reference, candidate)

    def _worst(self, case: int, ref: np.ndarray, got: np.ndarray, real: bool) -> None:
        rows = range(ref.shape[0]) if self.batched and ref.ndim > 1 else [None]
        for row in rows:
            was, now = (ref, got) if row is None else (ref[row], got[row])
            value = cosine(was, now)
            if real:
                self.error = max(self.error, relative_error(was, now))
            if value < self.cosine or not self.worst_sample:
                self.cosine, self.worst_sample = value, f"case {case}" + ("" if row is None else f" row {row}")

    def _decide(self, ref: np.ndarray, got: np.ndarray) -> None:
        """Argmax over the last axis of scores, of at least two each; whole numbers and bools are decisions already."""
        if ref.dtype.kind in "biu":
            equal = np.asarray(ref == got)
        elif ref.ndim > 1 and ref.shape[-1] > 1:
            equal = np.asarray(ref.argmax(-1) == got.argmax(-1))
        else:
            return
        self.decisions += equal.size
        self.agreed += int(equal.sum())

    @property
    def agreement(self) -> float | None:
        """Share of equal decisions; None where the output takes none."""
        return self.agreed / self.decisions if self.decisions else None

    def summary(self) -> dict[str, Any]:
        """The figures as JSON data."""
        if not self.elements and not self.problems:
            self.problems.append("no element was compared")
        return {
            "max_abs": self.max_abs,
            "mean_abs": self.sum_abs / max(self.elements, 1),
            "cosine": self.cosine,
            "worst_sample": self.worst_sample,
            "relative_error": self.error,
            "sqnr_db": self._sqnr_db(),
            "agreement": self.agreement,
            "elements": self.elements,
            "problems": self.problems,
        }

    def _sqnr_db(self) -> float:
        """10 log10(sum ref^2 / sum (ref - got)^2), capped at 300 dB either way."""
        if self.noise == 0:
            return _SQNR_CAP_DB
        if self.signal == 0 or not math.isfinite(self.signal + self.noise):
            return -_SQNR_CAP_DB
        return max(-_SQNR_CAP_DB, min(_SQNR_CAP_DB, 10 * math.log10(self.signal / self.noise)))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine of two arrays taken as vectors; two zero vectors are equal (1), one zero vector is not (0)."""
    if np.array_equal(a, b):
        return 1.0  # exactly: a profile may ask for it
    a, b = (_scaled(v.ravel()) for v in (a, b))
    product = float(np.linalg.norm(a) * np.linalg.norm(b))
    if product == 0:
        return 0.0
    return float(min(1.0, max(-1.0, a @ b / product)))


def error_max(cosine_min: float) -> float:
    """The relative error that goes with a cosine: the cosine alone is blind to scale.

    At an angle of that cosine, an output of the right length has sqrt(2 (1 - cosine)); twice that is for its length.
    """
    return 2 * math.sqrt(2 * max(0.0, 1 - cosine_min)) + 1e-6


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """L2 norm of the difference over that of the reference; the plain norm where the reference is zero."""
    largest = float(np.abs(reference).max(initial=0.0)) or 1.0
    size = float(np.linalg.norm(reference / largest))
    return float(np.linalg.norm((candidate - reference) / largest)) / (size or 1.0)


def _scaled(vector: np.ndarray) -> np.ndarray:
    """The vector divided by its largest size, or squares of very small or large numbers would be 0 or infinite."""
    largest = np.abs(vector).max(initial=0.0)
    return vector / largest if largest else vector

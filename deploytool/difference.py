"""How far one output is from its reference: errors added up over cases, one output at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

_SQNR_CAP_DB = 300.0  # equal arrays have infinite SQNR, which JSON cannot hold
_ROUNDINGS = 16.0  # units of rounding of the largest row that sums may leave in a row of nothing
_SCORES = ("logits", "scores")
_BLOCK_ELEMENTS = 1 << 16  # half a megabyte of doubles


@dataclass(frozen=True)
class _Sample:
    """One row of a batch, or one array: root mean squares, so that samples of all sizes can be compared."""

    name: str
    size: float
    error: float
    cosine: float


@dataclass
class Difference:
    """Errors of one output, accumulated over cases.

    Worst-sample figures (`cosine`, and `relative_error`: L2 norm of the difference over the reference's norm,
    floating-point outputs only) look at one row of the batch at a time where axis 0 is the batch, else at the whole
    array. A sample whose reference is nothing but rounding beside the largest one has no direction: its error is
    measured by the largest sample's size, and no cosine is taken of it.
    Elements that are the same infinity in both are equal and left out; any other non-finite element is a failure.
    """

    name: str
    batched: bool
    elements: int = 0
    max_abs: float = 0.0
    sum_abs: float = 0.0
    signal: float = 0.0
    noise: float = 0.0
    decisions: int = 0
    agreed: int = 0
    positions: int = 0
    sum_kl: float = 0.0
    max_kl: float = 0.0
    epsilon: float = 0.0  # of the output's type; 0 for whole numbers
    samples: list[_Sample] = field(default_factory=list)
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
        if reference.dtype.kind == "f":
            same_infinity = np.isinf(reference) & (reference == candidate)
            bad = int((~(np.isfinite(candidate) & np.isfinite(reference) | same_infinity)).sum())
            if bad:
                self.problems.append(f"case {case}: {bad} of {candidate.size} elements are not finite in one or both")
                return
            if same_infinity.any():
                reference, candidate = (np.where(same_infinity, 0, a).astype(a.dtype) for a in (reference, candidate))
            self.epsilon = float(np.finfo(reference.dtype).eps)
        scored = self._scores(reference)
        rows = range(len(reference)) if self.batched and reference.ndim > 1 else [None]
        for row in rows:
            was, now = (reference, candidate) if row is None else (reference[row], candidate[row])
            name = f"case {case}" + ("" if row is None else f" row {row}")
            sums = [self._add_block(ref, got, reference.ndim > 1, scored) for ref, got in _blocks(was, now)]
            self.samples.append(_sample(name, was, now, *np.sum(sums, axis=0).tolist()))

    def _add_block(
        self, reference: np.ndarray, candidate: np.ndarray, ranked: bool, scored: bool | None
    ) -> tuple[float, float, float, float]:
        """Add [n, m] elements; the sums of squares of reference, candidate and error, and the product's sum."""
        ref, got = reference.astype(np.float64), candidate.astype(np.float64)
        difference = got - ref
        error = np.abs(difference)
        self.elements += ref.size
        self.max_abs = max(self.max_abs, float(error.max()))
        self.sum_abs += float(error.sum())
        with np.errstate(over="ignore", invalid="ignore"):  # what is too large to square is judged in _sqnr_db
            flat, other, wrong = ref.ravel(), got.ravel(), difference.ravel()
            sums = float(flat @ flat), float(other @ other), float(wrong @ wrong), float(flat @ other)
        self.signal += sums[0]
        self.noise += sums[2]
        self._decide(reference, candidate, ranked)
        if scored is not None:
            self._diverge(ref, got, scored)
        return sums

    def _decide(self, ref: np.ndarray, got: np.ndarray, ranked: bool) -> None:
        """Argmax over the last axis of scores, of at least two each; whole numbers and bools are decisions already.

        Choosing what the reference holds equal to its own choice, within rounding, is no other decision.
        """
        if ref.dtype.kind in "biu":
            equal = np.asarray(ref == got)
        elif ranked and ref.shape[-1] > 1:
            chosen = np.take_along_axis(ref, got.argmax(-1)[..., None], -1)[..., 0]
            largest = np.maximum(np.abs(ref.max(-1)), np.abs(ref.min(-1)))
            equal = np.asarray((chosen == ref.max(-1)) | (ref.max(-1) - chosen <= _ROUNDINGS * self.epsilon * largest))
        else:
            return
        self.decisions += equal.size
        self.agreed += int(equal.sum())

    def _scores(self, ref: np.ndarray) -> bool | None:
        """Whether softmax makes probabilities of this output (True), it holds them (False), or is none of it (None)."""
        if ref.dtype.kind != "f" or ref.ndim < 2 or ref.shape[-1] < 2:
            return None
        if ref.min() >= 0 and np.allclose(ref.sum(-1, dtype=np.float64), 1.0, atol=1e-3):
            return False
        return True if any(word in self.name.lower() for word in _SCORES) else None

    def _diverge(self, ref: np.ndarray, got: np.ndarray, scored: bool) -> None:
        """Kullback-Leibler divergence in nats of what softmax makes of scores, or of probabilities as they are."""
        if scored:
            was, now = _log_softmax(ref), _log_softmax(got)
            share = np.exp(was)
        else:
            share = ref
            with np.errstate(divide="ignore"):
                was, now = np.log(ref), np.log(np.maximum(got, np.finfo(np.float32).tiny))
        with np.errstate(invalid="ignore"):
            divergence = np.where(share > 0, share * (was - now), 0.0).sum(-1)
        self.positions += divergence.size
        self.sum_kl += float(divergence.sum())
        self.max_kl = max(self.max_kl, float(divergence.max()))

    @property
    def cosine(self) -> float:
        """Cosine of the worst sample."""
        return self._worst()[0][0]

    @property
    def error(self) -> float:
        """Relative error of the worst sample; 0 for whole numbers, which are decisions."""
        return self._worst()[1][0] if self.epsilon else 0.0

    @property
    def agreement(self) -> float | None:
        """Share of equal decisions; None where the output takes none."""
        return self.agreed / self.decisions if self.decisions else None

    def summary(self) -> dict[str, Any]:
        """The figures as JSON data."""
        if not self.elements and not self.problems:
            self.problems.append("no element was compared")
        turned, wrong = self._worst()
        return {
            "max_abs": self.max_abs,
            "mean_abs": self.sum_abs / max(self.elements, 1),
            "cosine": turned[0],
            "worst_sample": turned[1],
            "relative_error": wrong[0] if self.epsilon else 0.0,
            "worst_error_sample": wrong[1] if self.epsilon else "",
            "sqnr_db": self._sqnr_db(),
            "agreement": self.agreement,
            "kl_mean": self.sum_kl / self.positions if self.positions else None,
            "kl_max": self.max_kl if self.positions else None,
            "elements": self.elements,
            "problems": self.problems,
        }

    def _worst(self) -> tuple[tuple[float, str], tuple[float, str]]:
        """The smallest cosine and the largest relative error, each with its sample."""
        scale = max((sample.size for sample in self.samples), default=0.0)
        cosines, errors = [], []
        for sample in self.samples:
            nothing = sample.size <= _ROUNDINGS * self.epsilon * (scale or 1.0)
            errors.append((sample.error / ((scale or 1.0) if nothing else sample.size), sample.name))
            meaningless = nothing and (scale > 0 or sample.error <= _ROUNDINGS * self.epsilon)
            cosines.append((1.0 if meaningless else sample.cosine, sample.name))
        return (min(cosines, key=lambda pair: pair[0], default=(1.0, "")),
                max(errors, key=lambda pair: pair[0], default=(0.0, "")))  # fmt: skip

    def _sqnr_db(self) -> float:
        """10 log10(sum ref^2 / sum (ref - got)^2), capped at 300 dB either way."""
        if self.noise == 0:
            return _SQNR_CAP_DB
        if not math.isfinite(self.signal + self.noise):
            return -_SQNR_CAP_DB
        if self.signal == 0:  # zeros everywhere: rounding of values of size 1 is no noise
            quiet = self.noise <= self.elements * (_ROUNDINGS * self.epsilon) ** 2
            return _SQNR_CAP_DB if quiet else -_SQNR_CAP_DB
        return max(-_SQNR_CAP_DB, min(_SQNR_CAP_DB, 10 * math.log10(self.signal / self.noise)))


def _blocks(was: np.ndarray, now: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of [n, m] pieces that fit into a processor's cache, m being the last axis."""
    width = was.shape[-1] if was.ndim else 1
    ref, got = was.reshape(-1, width), now.reshape(-1, width)
    rows = max(1, _BLOCK_ELEMENTS // width)
    for start in range(0, len(ref), rows):
        yield ref[start : start + rows], got[start : start + rows]


def _sample(name: str, was: np.ndarray, now: np.ndarray, ref: float, got: float, error: float, dot: float) -> _Sample:
    """Figures of one sample from its sums of squares; doubles may be too large or too small to square."""
    if was.dtype == np.float64:
        return _Sample(name, root_mean_square(was), root_mean_square(now - was), cosine(was, now))
    length = math.sqrt(ref) * math.sqrt(got)
    turned = 1.0 if error == 0 else min(1.0, max(-1.0, dot / length)) if length else 0.0
    return _Sample(name, math.sqrt(ref / was.size), math.sqrt(error / was.size), turned)


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


def root_mean_square(array: np.ndarray) -> float:
    """Its root mean square, in double precision, of numbers of any size; 0 of an empty array."""
    if not array.size:
        return 0.0
    wide = array.astype(np.float64)
    largest = float(np.abs(wide).max()) or 1.0
    return float(np.linalg.norm(wide / largest)) * largest / math.sqrt(wide.size)


def relative_error(reference: np.ndarray, candidate: np.ndarray) -> float:
    """L2 norm of the difference over that of the reference; the difference's root mean square where that is zero."""
    ref, got = reference.astype(np.float64), candidate.astype(np.float64)
    return root_mean_square(got - ref) / (root_mean_square(ref) or 1.0)


def _scaled(vector: np.ndarray) -> np.ndarray:
    """The vector divided by its largest size, or squares of very small or large numbers would be 0 or infinite."""
    largest = np.abs(vector).max(initial=0.0)
    return vector / largest if largest else vector


def _log_softmax(scores: np.ndarray) -> np.ndarray:
    shifted = scores - scores.max(-1, keepdims=True)
    logarithms: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logarithms

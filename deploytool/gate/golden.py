"""The candidate's engine, run here on recorded inputs, against recorded outputs: the worst sample decides."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from deploytool.artifact import GOLDEN, Artifact
from deploytool.cases import Case, read_cases
from deploytool.errors import DeployError, EnvironmentLacking
from deploytool.gate.limits import GateLimits
from deploytool.results import Finding, FindingStatus
from deploytool.signature import Outputs, TensorSpec

Replay = Callable[[Artifact, Sequence[Case]], Sequence[Outputs]]


@dataclass
class Distance:
    """How far one output is from what was recorded, over cases; `problems` are what no number can excuse.

    cosine   of the worst sample (a row where axis 0 is the batch)
    error    L2 norm of the difference over the recorded norm, worst sample, floating-point outputs only
    agreed   decisions that are equal: argmax over the last axis, or elements of an integer output
    """

    elements: int = 0
    cosine: float = 1.0
    error: float = 0.0
    decisions: int = 0
    agreed: int = 0
    problems: list[str] = field(default_factory=list)

    def add(self, spec: TensorSpec, recorded: np.ndarray | None, got: np.ndarray | None) -> None:
        """Compare one case."""
        if recorded is None or got is None:
            self.problems.append("nothing was recorded" if recorded is None else "it is missing")
            return
        if recorded.shape != got.shape or recorded.dtype != got.dtype:
            self.problems.append(f"must be {recorded.dtype}{list(recorded.shape)} (got {got.dtype}{list(got.shape)})")
            return
        real = recorded.dtype.kind == "f"
        masked = np.isinf(recorded) & (recorded == got) if real else np.zeros(recorded.shape, bool)
        rows = recorded.shape[0] if spec.shape and spec.shape[0] == "batch" and recorded.size else 1
        was, now = (np.where(masked, 0.0, a.astype(np.float64)).reshape(rows, -1) for a in (recorded, got))
        if not np.isfinite(was).all() or not np.isfinite(now).all():
            self.problems.append(f"holds NaN or infinity{' where it was recorded' * (not np.isfinite(was).all())}")
            return
        self.elements += recorded.size
        self._measure(was, now, real)
        self._decide(recorded, got, real)

    def _measure(self, was: np.ndarray, now: np.ndarray, real: bool) -> None:
        size, other = np.linalg.norm(was, axis=1), np.linalg.norm(now, axis=1)
        product = size * other
        safe = np.where(product > 0, product, 1.0)
        equal = (was == now).all(axis=1)
        cosine = np.where(equal, 1.0, np.where(product > 0, (was * now).sum(axis=1) / safe, 0.0))
        self.cosine = min(self.cosine, float(cosine.min(initial=1.0)))
        if real:
            error = np.linalg.norm(was - now, axis=1) / np.where(size > 0, size, 1.0)
            self.error = max(self.error, float(error.max(initial=0.0)))

    def _decide(self, recorded: np.ndarray, got: np.ndarray, real: bool) -> None:
        if real and (recorded.ndim < 2 or recorded.shape[-1] < 2 or not recorded.size):
            return
        equal = recorded.argmax(-1) == got.argmax(-1) if real else recorded == got
        self.decisions += equal.size
        self.agreed += int(equal.sum())

    @property
    def agreement(self) -> float | None:
        """Share of equal decisions; None where the output takes none."""
        return self.agreed / self.decisions if self.decisions else None


def check_golden(
    target: str, candidate: Artifact, released: Artifact, replay: Replay, limits: GateLimits
) -> Iterator[Finding]:
    """Replay the released cases, then the candidate's own; EnvironmentLacking passes through: nothing was shown."""
    for gate, owner, bound in (("golden", released, not limits.new_model), ("replay", candidate, True)):
        try:
            cases = list(read_cases(owner.folder / GOLDEN))
            outputs = list(replay(candidate, cases)) if cases else []
        except EnvironmentLacking:
            raise
        except DeployError as error:
            yield Finding(gate, target, "fail", f"the candidate must run on recorded inputs (got: {error.message})")
            continue
        if not cases or len(outputs) != len(cases):
            yield Finding(gate, target, "fail", "every recorded case must be replayed",
                          len(outputs), max(1, len(cases)), "cases")  # fmt: skip
            continue
        for spec in owner.signature.outputs:
            yield from _judge(gate, target, spec, candidate, cases, outputs, bound)


def _judge(
    gate: str, target: str, spec: TensorSpec, candidate: Artifact, cases: Sequence[Case], outputs: Sequence[Outputs],
    bound: bool,
) -> Iterator[Finding]:  # fmt: skip
    """One output against the reference, which binds, and against the recorded engine, which is told."""
    reference, engine = Distance(), Distance()
    for case, got in zip(cases, outputs, strict=True):
        expected = case.reference or case.outputs
        reference.add(spec, expected.get(spec.name), got.get(spec.name))
        engine.add(spec, case.outputs.get(spec.name), got.get(spec.name))
    subject = f"{target} {spec.name}"
    problems = list(dict.fromkeys(reference.problems + engine.problems))
    if not problems and not reference.elements:
        problems = ["no element was compared"]
    if problems:
        yield Finding(gate, subject, "fail", f"output {spec.name!r}: {'; '.join(problems)}")
        return
    sentence, status, cosine_min = _verdict(spec, reference, candidate)
    yield Finding(gate, subject, status if bound else "note", sentence, reference.cosine, cosine_min, "worst cosine")
    if gate == "golden":
        yield Finding(gate, subject, "note", f"against the released engine{_decisions(engine)}", engine.cosine, None,
                      "worst cosine")  # fmt: skip


def _verdict(spec: TensorSpec, distance: Distance, candidate: Artifact) -> tuple[str, FindingStatus, float | None]:
    """Sentence, "pass" or "fail", and the cosine that the candidate's profile asks for."""
    profile = candidate.target.get("parity") or {}
    cosine_min, agreement_min = profile.get("cosine_min"), profile.get("agreement_min")
    if not isinstance(cosine_min, int | float):
        return "the candidate's profile must hold cosine_min (it does not)", "fail", None
    # The cosine is blind to scale. At the angle that it allows, an output of the right length has this error; twice
    # that is for its length.
    error_max = 2 * math.sqrt(2 * max(0.0, 1 - cosine_min)) + 1e-6
    if distance.cosine < cosine_min:
        return f"output {spec.name!r} is too far from the reference{_decisions(distance)}", "fail", cosine_min
    if distance.error > error_max:
        return (f"output {spec.name!r} has the wrong scale: relative error {distance.error:.3g}, at most "
                f"{error_max:.3g} is allowed"), "fail", cosine_min  # fmt: skip
    if agreement_min is not None and distance.agreement is not None and distance.agreement < agreement_min:
        return f"too few decisions of {spec.name!r} are equal{_decisions(distance)}", "fail", cosine_min
    return f"output {spec.name!r} is near the reference{_decisions(distance)}", "pass", cosine_min


def _decisions(distance: Distance) -> str:
    return "" if distance.agreement is None else f"; {distance.agreed} of {distance.decisions} decisions are equal"

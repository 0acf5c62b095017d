"""The candidate's engine, run here on recorded inputs, against recorded outputs: the worst sample decides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from deploytool.artifact import GOLDEN, Artifact
from deploytool.cases import Case, read_cases, sizes_of, unrecorded
from deploytool.difference import Difference, error_max
from deploytool.errors import DeployError, EnvironmentLacking
from deploytool.gate.limits import GateLimits
from deploytool.results import Finding, FindingStatus
from deploytool.signature import Outputs, TensorSpec

Replay = Callable[[Artifact, Sequence[Case]], Sequence[Outputs]]


Report = Mapping[str, Any]


def check_golden(
    target: str, candidate: Artifact, released: Artifact, reports: tuple[Report | None, Report | None], replay: Replay,
    limits: GateLimits,
) -> Iterator[Finding]:  # fmt: skip
    """Replay the released cases, then the candidate's own; EnvironmentLacking passes through: nothing was shown.

    What the owner's report was taken on and its cases do not show is noted.
    """
    ours, theirs = reports
    for gate, owner, report, bound in (("golden", released, theirs, not limits.new_model),
                                       ("replay", candidate, ours, True)):  # fmt: skip
        try:
            cases = list(read_cases(owner.folder / GOLDEN))
            outputs = list(replay(candidate, cases)) if cases else []
            unshown = unrecorded(sizes_of(owner.signature, cases), len(cases), (report or {}).get("parity"))
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
        if unshown:
            yield Finding(gate, target, "note", unshown)


def _judge(
    gate: str, target: str, spec: TensorSpec, candidate: Artifact, cases: Sequence[Case], outputs: Sequence[Outputs],
    bound: bool,
) -> Iterator[Finding]:  # fmt: skip
    """One output against the reference, which binds, and against the recorded engine, which is told."""
    batched = bool(spec.shape) and spec.shape[0] == "batch"
    reference, engine = Difference(spec.name, batched), Difference(spec.name, batched)
    for index, (case, got) in enumerate(zip(cases, outputs, strict=True)):
        expected = case.reference or case.outputs
        reference.add(index, expected.get(spec.name), got.get(spec.name))
        engine.add(index, case.outputs.get(spec.name), got.get(spec.name))
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


def _verdict(spec: TensorSpec, distance: Difference, candidate: Artifact) -> tuple[str, FindingStatus, float | None]:
    """Sentence, "pass" or "fail", and the cosine that the candidate's profile asks for."""
    profile = candidate.target.get("parity") or {}
    cosine_min, agreement_min = profile.get("cosine_min"), profile.get("agreement_min")
    if not isinstance(cosine_min, int | float):
        return "the candidate's profile must hold cosine_min (it does not)", "fail", None
    if distance.cosine < cosine_min:
        return f"output {spec.name!r} is too far from the reference{_decisions(distance)}", "fail", cosine_min
    if distance.error > error_max(cosine_min):
        return (f"output {spec.name!r} has the wrong scale: relative error {distance.error:.3g}, at most "
                f"{error_max(cosine_min):.3g} is allowed"), "fail", cosine_min  # fmt: skip
    if agreement_min is not None and distance.agreement is not None and distance.agreement < agreement_min:
        return f"too few decisions of {spec.name!r} are equal{_decisions(distance)}", "fail", cosine_min
    return f"output {spec.name!r} is near the reference{_decisions(distance)}", "pass", cosine_min


def _decisions(distance: Difference) -> str:
    return "" if distance.agreement is None else f"; {distance.agreed} of {distance.decisions} decisions are equal"

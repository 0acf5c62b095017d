"""The release gate: a candidate against what was released. Cheap gates first; evidence that is missing fails."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from deploytool.artifact import Artifact
from deploytool.errors import DeployError, EnvironmentLacking, IntegrityBroken, UsageProblem, nearest
from deploytool.gate.contract import check_contract
from deploytool.gate.evidence import check_quality, check_reports, note_memory, read_report
from deploytool.gate.golden import Replay, check_golden
from deploytool.gate.limits import GateLimits
from deploytool.results import Finding, FindingStatus, Verdict

Compare = Callable[[Artifact, Artifact], Mapping[str, Any]]
DEFAULTS = GateLimits()


def check(
    candidate: Mapping[str, Artifact], released: Mapping[str, Artifact], *, replay: Replay, compare: Compare | None,
    limits: GateLimits = DEFAULTS, only: Collection[str] = (),
) -> Verdict:  # fmt: skip
    """Judge every released target's candidate, or that of the targets named in `only`; both are artifacts by target.

    `replay(artifact, cases)` runs an artifact on the cases' inputs and returns their outputs in order.
    `compare(candidate, released)` times both here, interleaved, and returns "speedup" (released time / candidate
    time) and "speedup_ci" ([low, high], or None when it could not be decided); without it latency is inconclusive.
    Raises EnvironmentLacking when an engine cannot run on this machine, UsageProblem when `only` names what was not
    released.
    """
    unknown = [target for target in only if target not in released]
    if unknown:
        raise UsageProblem("DT201", f"--target must name what was released, {', '.join(released)} (got {unknown[0]!r})",
                           detail=[nearest(unknown[0], list(released))])  # fmt: skip
    findings: list[Finding] = []
    for target, old in released.items():
        if only and target not in only:
            findings.append(Finding("contract", target, "note", "not judged: other targets were named"))
        elif target in candidate:
            findings += _one(target, candidate[target], old, replay, compare, limits)
        else:
            findings.append(Finding("contract", target, "fail", "the target must be in the candidate (it is missing)"))
    findings += [Finding("contract", target, "note", "the target is new: nothing was released to compare with")
                 for target in candidate if target not in released]  # fmt: skip
    return Verdict(tuple(findings))


def _one(
    target: str, new: Artifact, old: Artifact, replay: Replay, compare: Compare | None, limits: GateLimits
) -> list[Finding]:
    findings = [_integrity(target, "candidate", new), _integrity(target, "released", old)]
    if any(finding.status == "fail" for finding in findings):
        return findings  # a damaged engine is not opened
    reports = read_report(new), read_report(old)
    findings += check_contract(target, new, old)
    findings += check_reports(target, new, reports)
    findings += check_golden(target, new, old, (reports[0][0], reports[1][0]), replay, limits)
    findings += check_quality(target, new, reports[0][0], reports[1][0], limits)
    findings.append(_size(target, new, old, limits))
    broken = any(finding.status == "fail" for finding in findings)
    findings += _latency(target, new, old, None if broken else compare, limits)
    findings += note_memory(target, reports[0][0], reports[1][0])
    return findings


def _integrity(target: str, which: str, artifact: Artifact) -> Finding:
    try:
        artifact.check()
    except IntegrityBroken as error:
        return Finding("integrity", target, "fail", f"the {which} artifact is damaged: {'; '.join(error.detail)}"
                       if error.detail else f"the {which} artifact is damaged: {error.message}")  # fmt: skip
    return Finding("integrity", target, "pass", f"every file of the {which} artifact is the one that was recorded")


def _size(target: str, new: Artifact, old: Artifact, limits: GateLimits) -> Finding:
    limit = old.size_bytes * (1 + limits.size_growth_max)
    return Finding("size", target, "pass" if new.size_bytes <= limit else "fail",
                   f"the size may grow by {limits.size_growth_max:.1%} (released {old.size_bytes} bytes)",
                   new.size_bytes, int(limit), "bytes")  # fmt: skip


def _latency(
    target: str, new: Artifact, old: Artifact, compare: Compare | None, limits: GateLimits
) -> Iterator[Finding]:
    if limits.slowdown_max is None:
        yield Finding("latency", target, "note", "latency was not asked for")
    elif not (new.executes and old.executes):
        yield Finding("latency", target, "inconclusive", "the engine is for hardware that is not here: not timed")
    elif compare is None:
        yield Finding("latency", target, "inconclusive", "not timed")
    else:
        try:
            yield _judge_latency(target, compare(new, old), 1 + limits.slowdown_max)
        except EnvironmentLacking:
            raise
        except DeployError as error:
            yield Finding("latency", target, "fail", f"both must run to be timed (got: {error.message})")


def _judge_latency(target: str, timed: Mapping[str, Any], limit: float) -> Finding:
    """Fail when the whole interval of candidate time / released time lies above the limit, pass when below."""
    interval = timed["speedup_ci"]
    if interval is None or timed["speedup"] is None or not 0 < interval[0] <= interval[1]:
        return Finding("latency", target, "inconclusive", "too few undisturbed blocks to tell", None, limit)
    value, low, high = 1 / timed["speedup"], 1 / interval[1], 1 / interval[0]
    status: FindingStatus = "inconclusive"
    word = "may be above or below the limit: allow more time, or a quieter machine"
    if low > limit:
        status, word = "fail", "is slower than allowed"
    elif high <= limit:
        status, word = "pass", "is within the limit"
    sentence = f"time over the released time, 95 % interval {low:.3f} to {high:.3f}, {word}"
    return Finding("latency", target, status, sentence, value, limit)

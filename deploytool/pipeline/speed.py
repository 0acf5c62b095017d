"""One target's timing within an export: against the eager module, and against what it must beat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from deploytool.artifact import Artifact
from deploytool.bench.compare import compare, headline
from deploytool.bench.decoding import measure_decoding, told
from deploytool.decoding import decodes
from deploytool.errors import BackendFailed, DeployError
from deploytool.pipeline.best import against_plain, against_uncompressed
from deploytool.pipeline.reference import Reference
from deploytool.target import Target, load_target
from deploytool.worker import Limits

_UNCOMPRESSED = "uncompressed"
_UNTIMED = "not timed against the uncompressed model's"


def speed_of(
    target: Target, artifact: Artifact, reference: Reference, done: Sequence[Mapping[str, Any]], *,
    limits: Limits, budget_seconds: float, seed: int,
) -> tuple[dict[str, Any], dict[str, Any], list[str]]:  # fmt: skip
    """The report's "speed" and "memory", and what has to be said about them. `done` are the results of this run."""
    others = {"eager": reference.eager()}
    if target.plain is not None:
        others[target.plain] = reference.plain(target.plain, done)
    original, findings = _of_uncompressed(target, reference)
    how: dict[str, Any] = {"limits": limits, "budget_seconds": budget_seconds, "seed": seed}
    try:
        timed = compare(artifact, others | original, reference.cases[0], **how)
    except BackendFailed as error:
        if not original:
            raise
        original, findings = {}, [f"{_UNTIMED}: {error.message}"]  # it may be that one which does not run here
        timed = compare(artifact, others, reference.cases[0], **how)
    against = timed["against"]
    memory = {"peak_rss_bytes": timed.pop("peak_rss_bytes")}
    speed = {**timed, "reference_p50_ms": against["eager"]["p50_ms"], **headline(against["eager"])}
    for name, other in (others | original).items():
        against[name]["size_bytes"] = other.size_bytes
    if decodes(artifact.signature):
        speed["decoding"] = measure_decoding({"": artifact, **others}, limits, seed=seed)
        findings.append(told(speed["decoding"]))
    if target.plain is None and target.precision != "fp32":
        findings.append(f"whether {target.precision} is faster than fp32 was not measured: the profile has no `plain`")
    if target.plain is not None and against[target.plain]["verdict"] != "faster":
        findings.append(against_plain(target, against[target.plain]))
    before = against.get("eager" if target.backend == "eager" else _UNCOMPRESSED)
    if reference.is_compressed and before is not None and before["verdict"] != "faster":
        findings.append(against_uncompressed(target, before))
    return speed, memory, findings


def _of_uncompressed(target: Target, reference: Reference) -> tuple[dict[str, Artifact], list[str]]:
    """What a compressed model's artifact must beat: the plain one of the uncompressed model; or why there is none.

    The eager module of the uncompressed model is timed anyway.
    """
    original = reference.uncompressed
    if original is None or target.backend == "eager":
        return {}, []
    try:
        if isinstance(original, DeployError):
            raise original
        return {_UNCOMPRESSED: original.made(load_target(target.plain) if target.plain else target)}, []
    except DeployError as error:
        return {}, [f"{_UNTIMED}: {error.message}"]

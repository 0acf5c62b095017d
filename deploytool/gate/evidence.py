"""What the exports' own reports say: parity, task metrics, peak memory. A report that is missing or stale fails."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from deploytool.artifact import MANIFEST, REPORT, Artifact
from deploytool.gate.limits import GateLimits
from deploytool.results import Finding
from deploytool.storage import read_json, sha256_file

Report = Mapping[str, Any]


def read_report(artifact: Artifact) -> tuple[Report | None, str]:
    """An artifact's report, and what is wrong with it: only one that names this very artifact.json is given."""
    path = artifact.folder / REPORT
    try:
        data = read_json(path)
        belongs = data["artifact_digest"] == sha256_file(artifact.folder / MANIFEST)
    except FileNotFoundError:
        return None, f"{path.name} is missing"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{path.name} can't be read ({error!r})"
    return (data, "") if belongs else (None, f"{path.name} belongs to another artifact (its digest is not this one's)")


def check_reports(
    target: str, candidate: Artifact, reports: tuple[tuple[Report | None, str], tuple[Report | None, str]]
) -> Iterator[Finding]:
    """Both reports are there and belong; the candidate's says that parity passed for every output."""
    (new, wrong), (_, old_wrong) = reports
    if old_wrong:
        yield Finding("parity", target, "fail", f"the released artifact's {old_wrong}")
    if new is None:
        yield Finding("parity", target, "fail", f"the candidate's {wrong}")
        return
    parity = new.get("parity") or {}
    outputs = parity.get("outputs") or {}
    cosines = [_number(outputs.get(name), "cosine") for name in candidate.signature.output_names]
    if parity.get("passed") is not True or new.get("status") != "ok":
        yield Finding("parity", target, "fail", f"the candidate's export did not pass: {new.get('reason') or 'parity'}")
    elif not parity.get("cases") or None in cosines:
        yield Finding("parity", target, "fail", "the candidate's report must hold figures of every output")
    else:
        yield Finding("parity", target, "pass", f"parity passed on {parity['cases']} cases against the reference",
                      min(c for c in cosines if c is not None), None, "worst cosine")  # fmt: skip
    if new.get("executed") is False:
        yield Finding("parity", target, "note", "not executed: parity is of the graph that the compiler was given")


def check_quality(
    target: str, candidate: Artifact, new: Report | None, old: Report | None, limits: GateLimits
) -> Iterator[Finding]:
    """No metric of the released report is missing, or worse by more than allowed."""
    if new is None or old is None:
        return  # check_reports has failed already
    ours, theirs = new.get("quality") or {}, old.get("quality") or {}
    for name, pair in theirs.items():
        yield _metric(f"{target} {name}", ours.get(name), pair, limits.metric_drop_max)
    for name in ours:
        if name not in theirs:
            yield Finding("quality", f"{target} {name}", "note", f"{name} is new: nothing was released to compare with")
    yield from _generation(target, candidate, new, old)
    if not theirs and limits.new_model:
        yield Finding("quality", target, "inconclusive", "the model is new and no task metric says whether it is good")


def _metric(subject: str, pair: Any, released: Any, drop_max: float) -> Finding:
    name = subject.rpartition(" ")[2]
    was, now = _number(released, "candidate"), _number(pair, "candidate")
    if was is None:
        return Finding("quality", subject, "fail", f"the released {name} is not a finite number")
    if now is None:
        return Finding("quality", subject, "fail", f"the candidate must have {name} (it is missing or not finite)",
                       None, was)  # fmt: skip
    lower = bool(released.get("lower_is_better"))
    if bool(pair.get("lower_is_better")) != lower:
        return Finding("quality", subject, "fail", f"{name} must keep its direction (got it turned round)", now, was)
    limit = was + (1 if lower else -1) * drop_max * abs(was)
    good = now <= limit if lower else now >= limit
    word = "most" if lower else "least"
    return Finding("quality", subject, "pass" if good else "fail",
                   f"{name} must be at {word} {limit:.6g} (released {was:.6g}, got {now:.6g})", now, limit)  # fmt: skip


def _generation(target: str, candidate: Artifact, new: Report, old: Report) -> Iterator[Finding]:
    was = _number(old.get("generation"), "agreement")
    if was is None:
        return
    now = _number(new.get("generation"), "agreement")
    limit = _number(candidate.target.get("parity"), "generation_min")
    if now is None:
        yield Finding("quality", target, "fail", "decoded tokens must be compared with the reference's (they are not)")
    elif limit is not None and now < limit:
        yield Finding("quality", target, "fail", "decoded tokens differ more than the profile allows", now, limit)
    else:
        yield Finding("quality", target, "pass" if limit is not None else "note",
                      f"share of decoded tokens equal to the reference's (released {was:.4f})", now, limit)  # fmt: skip


def note_memory(target: str, new: Report | None, old: Report | None) -> Iterator[Finding]:
    """Peak memory of both exports: noted, since the machines may differ."""
    now, was = (_number((report or {}).get("memory"), "peak_rss_bytes") for report in (new, old))
    if now is not None and was is not None:
        yield Finding("memory", target, "note", f"peak memory at export (released {was / 1e6:.0f} MB)", now / 1e6,
                      None, "MB")  # fmt: skip


def _number(table: Any, key: str) -> float | None:
    """A finite number of a table, or None."""
    value = table.get(key) if isinstance(table, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)

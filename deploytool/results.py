"""What a release gate says: findings, and the verdict that follows from them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

SCHEMA_VERSION = "1.0"

FindingStatus = Literal["pass", "fail", "inconclusive", "note"]
VerdictStatus = Literal["passed", "failed", "inconclusive"]
Measured = float | int | str | None


@dataclass(frozen=True)
class Finding:
    """One thing that a gate looked at.

    gate      which gate: "integrity", "contract", "parity", "golden", "quality", "size", "latency", "memory", ...
    subject   what it is about: the target's name, and the output or metric where there is one
    measured  what was found, and `limit` what it had to be, both in `unit` ("" for ratios and words)
    """

    gate: str
    subject: str
    status: FindingStatus
    sentence: str
    measured: Measured = None
    limit: Measured = None
    unit: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """What follows from the findings: failed when any failed, else inconclusive when any is, else passed."""

    findings: tuple[Finding, ...]

    @property
    def status(self) -> VerdictStatus:
        seen = {finding.status for finding in self.findings}
        if "fail" in seen or "pass" not in seen:  # nothing looked at is no reason to release
            return "failed"
        return "inconclusive" if "inconclusive" in seen else "passed"

    def to_json(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "status": self.status,
            "findings": [finding.to_json() for finding in self.findings],
        }

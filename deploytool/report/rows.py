"""Results as rows of text: the one source of the table, the Markdown and the HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploytool.results import Verdict

_NONE = "-"
_TELLING = 100.0  # an interval whose ends lie further apart than this factor tells nothing
_ALIKE = 2.0  # as the verdict has it: blocks further apart than this factor have no common ratio


@dataclass(frozen=True)
class Grid:
    """A header, rows of the same length, which columns hold numbers, and lines to stand below."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numbers: frozenset[str]
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Curve:
    """A loss over optimizer steps: what it belongs to, and (step, loss) in the order of the steps."""

    title: str
    points: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Page:
    """A grid with a title and facts, each a name and a value; curves are for pages that can draw."""

    title: str
    facts: tuple[tuple[str, str], ...]
    grid: Grid
    curves: tuple[Curve, ...] = ()


_EXPORT = ("target", "status", "precision", "size MB", "worst cosine", "max abs", "metrics: reference -> artifact",
           "p50 ms", "speed-up [95 %]", "peak MB", "verdict")  # fmt: skip
_NUMBERS = frozenset({"size MB", "worst cosine", "max abs", "p50 ms", "peak MB", "measured", "limit"})


def export_page(report: Mapping[str, Any]) -> Page:
    """The report that `export --json` prints: whose it is, where it was measured, and its grid."""
    environment = report.get("environment") or {}
    facts = tuple((str(name), str(value)) for name, value in environment.items()
                  if isinstance(value, str | int | float))  # fmt: skip
    return Page(f"Export of {report.get('model', 'a model')}", facts, export_grid(report))


def check_page(verdict: Verdict | Mapping[str, Any]) -> Page:
    """A verdict, or its JSON, and its grid."""
    return Page("Release check", (), check_grid(verdict))


def export_grid(report: Mapping[str, Any]) -> Grid:
    """One row per target of the report that `export --json` prints; reasons and findings as lines."""
    targets = report["targets"]
    lines = [f"{t['target']}: {line}" for t in targets for line in _remarks(t)]
    return Grid(_EXPORT, tuple(_export_row(t) for t in targets), _NUMBERS, tuple(lines))


def check_grid(verdict: Verdict | Mapping[str, Any]) -> Grid:
    """One row per finding of a verdict, those that decide first; the verdict itself as the last line."""
    data = verdict.to_json() if isinstance(verdict, Verdict) else verdict
    order = {"fail": 0, "inconclusive": 1, "pass": 2, "note": 3}
    findings = sorted(data["findings"], key=lambda f: order[f["status"]])
    rows = tuple((f["gate"], f["subject"], f["status"], _measured(f["measured"], f["unit"]),
                  _measured(f["limit"], f["unit"]), f["sentence"]) for f in findings)  # fmt: skip
    counts = {status: sum(f["status"] == status for f in findings) for status in order}
    said = ", ".join(f"{count} {status}" for status, count in counts.items() if count) or "nothing was looked at"
    return Grid(("gate", "subject", "status", "measured", "limit", "finding"), rows, _NUMBERS,
                (f"verdict: {data['status']} ({said})",))  # fmt: skip


def _export_row(target: Mapping[str, Any]) -> tuple[str, ...]:
    outputs = list(((target.get("parity") or {}).get("outputs") or {}).values())
    speed = target.get("speed") or {}
    return (
        str(target["target"]),
        str(target["status"]),
        _precision(target),
        _scaled(target.get("size_bytes"), 1e6, "{:.2f}"),
        _extreme(min, outputs, "cosine", "{:.6f}"),
        _extreme(max, outputs, "max_abs", "{:.2e}"),
        ", ".join(_metrics(target)) or _NONE,
        _scaled(speed.get("p50_ms"), 1, "{:.3f}"),
        speedup_text(speed),
        _scaled((target.get("memory") or {}).get("peak_rss_bytes"), 1e6, "{:.0f}"),
        str(speed.get("verdict") or _NONE),
    )


def _precision(target: Mapping[str, Any]) -> str:
    """The precision that was asked for, and what share of the computing is not in fp32."""
    asked = str(target.get("precision") or _NONE)
    compute = (target.get("ran") or {}).get("compute_by_precision")
    return asked if not compute or asked in (_NONE, "fp32") else f"{asked} {1 - compute.get('fp32', 0.0):.0%}"


def _metrics(target: Mapping[str, Any]) -> Iterator[str]:
    for name, pair in (target.get("quality") or {}).items():
        yield f"{name} {_number(pair.get('reference'))} -> {_number(pair.get('candidate'))}"
    if generation := target.get("generation"):
        yield f"same tokens {_number(generation['agreement'])}"


def _remarks(target: Mapping[str, Any]) -> Iterator[str]:
    if target.get("reason"):
        yield str(target["reason"])
    findings = [str(finding) for finding in target.get("findings") or ()]
    if target.get("executed") is False and not any("not executed" in finding for finding in findings):
        yield "not executed here: the engine was built for other hardware"
    yield from findings
    speed = target.get("speed") or {}
    if speed.get("verdict") == "undecided":  # why, or it looks like a mistake beside a narrow interval
        yield from (f"timing: {note}" for note in speed.get("notes") or ())


def _extreme(choose: Any, outputs: Sequence[Mapping[str, Any]], key: str, form: str) -> str:
    values = [output[key] for output in outputs if output.get(key) is not None]
    return form.format(choose(values)) if values else _NONE


def _scaled(value: float | None, unit: float, form: str) -> str:
    return _NONE if value is None else form.format(value / unit)


def speedup_text(speed: Mapping[str, Any]) -> str:
    """The ratio with its 95 % interval in brackets; in words the lowest and highest of the blocks where there is none.

    So too where one block of a few was disturbed and the interval reaches over orders of magnitude. Blocks that lie
    more than a factor of two apart have no ratio that could stand for them.
    """
    if speed.get("speedup") is None:
        return _NONE
    ratio = f"{speed['speedup']:.2f}x"
    interval, seen = speed.get("speedup_ci"), speed.get("speedup_range")
    if interval and (interval[1] <= _TELLING * interval[0] or not seen):
        return f"{ratio} [{interval[0]:.2f}, {interval[1]:.2f}]"
    if not seen:
        return ratio
    blocks = f"blocks {seen[0]:.2f} to {seen[1]:.2f}"
    return f"{ratio}, {blocks}" if seen[1] <= _ALIKE * seen[0] else blocks


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else _NONE if value is None else str(value)


def _measured(value: Any, unit: str) -> str:
    return _number(value) + (f" {unit}" if unit and value is not None else "")

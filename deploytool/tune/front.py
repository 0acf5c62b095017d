"""The Pareto front of a search: what nothing else beats in time, size and quality at once; as rows and as a picture."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from deploytool.report.rows import Grid

_AXES = ("relative_time", "size_bytes", "drop")
_HEADER = ("configuration", "status", "time", "p50 ms", "size MB", "peak MB", "drop", "front", "reason")
_NUMBERS = frozenset({"time", "size MB", "peak MB", "drop"})
_WIDTH, _HEIGHT, _MARGIN = 720, 420, 60


def front(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the configurations that no other is at least as good as in every axis and better in one.

    Axes: time relative to the anchor (where timed), bytes, drop of quality; smaller is better. Only what was evaluated
    and kept the quality stands on it.
    """
    fit = [one for one in found if one["status"] == "fit"]
    return [one["name"] for one in sorted(fit, key=_point) if not any(_beats(other, one) for other in fit)]


def _point(one: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(math.inf if one[axis] is None else float(one[axis]) for axis in _AXES)


def _beats(other: Mapping[str, Any], one: Mapping[str, Any]) -> bool:
    a, b = _point(other), _point(one)
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


def tune_grid(result: Mapping[str, Any]) -> Grid:
    """One row per configuration, the chosen one first, then the quickest."""
    chosen = result["chosen"]["name"]
    ordered = sorted(result["configurations"], key=lambda c: (c["name"] != chosen, c["status"] != "fit", _point(c)))
    rows = tuple(_row(one, one["name"] == chosen, one["name"] in result["front"]) for one in ordered)
    return Grid(_HEADER, rows, _NUMBERS, tuple(result["findings"]))


def _row(one: Mapping[str, Any], chosen: bool, on_front: bool) -> tuple[str, ...]:
    def number(value: float | None, unit: float, form: str) -> str:
        return "-" if value is None else form.format(value / unit)

    return (
        one["name"],
        "chosen" if chosen else one["status"],
        number(one["relative_time"], 1, "{:.3f}x"),
        ", ".join(f"{ms:.3f}" for ms in one["p50_ms"].values()) or "-",
        number(one["size_bytes"], 1e6, "{:.2f}"),
        number(one["peak_rss_bytes"], 1e6, "{:.0f}"),
        number(one["drop"], 0.01, "{:.3f} %"),
        "yes" if on_front else "",
        (one["reason"] or "")[:100],
    )


def plot(result: Mapping[str, Any]) -> str:
    """The configurations as an SVG picture: time relative to the anchor against size, both on log axes.

    Where nothing was timed, since size is the objective, the drop of quality stands in the place of the time.
    """
    timed = any(one["relative_time"] for one in result["configurations"])
    axis = "relative_time" if timed else "drop"
    points = [one for one in result["configurations"] if one[axis] is not None and one["size_bytes"]]
    if not points:
        return ""
    across, sizes = [one[axis] * (1 if timed else 100) for one in points], [one["size_bytes"] / 1e6 for one in points]
    x, y = _scale(across, _MARGIN, _WIDTH - _MARGIN, log=timed), _scale(sizes, _HEIGHT - _MARGIN, _MARGIN)
    places = [(one, x(a), y(s)) for one, a, s in zip(points, across, sizes, strict=True)]
    marks = [_mark(one, a, s, result) for one, a, s in places]
    line = [f"{a:.1f},{s:.1f}" for one, a, s in sorted(places, key=lambda p: -p[2]) if one["name"] in result["front"]]
    named = f"time of a run, relative to {result['anchor']}" if timed else "drop of the quality, %"
    axes = (f'<text x="{_WIDTH / 2}" y="{_HEIGHT - 15}" text-anchor="middle">{html.escape(named)} '
            f"({min(across):.3g} to {max(across):.3g})</text>"
            f'<text x="15" y="{_HEIGHT / 2}" transform="rotate(-90 15 {_HEIGHT / 2})" text-anchor="middle">'
            f"size, MB ({min(sizes):.3g} to {max(sizes):.3g})</text>")  # fmt: skip
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
            f'font-size="12"><rect width="100%" height="100%" fill="white"/>{axes}'
            f'<polyline points="{" ".join(line)}" fill="none" stroke="#c33"/>{"".join(marks)}</svg>\n')  # fmt: skip


def _scale(values: Sequence[float], low: float, high: float, *, log: bool = True) -> Callable[[float], float]:
    """Where a value stands between `low` and `high`, the places of the smallest and the largest."""
    of = math.log if log else float
    first, last = of(min(values)), of(max(values))
    span = (last - first) or 1.0
    return lambda value: low + (high - low) * (of(value) - first) / span


def _mark(one: Mapping[str, Any], x: float, y: float, result: Mapping[str, Any]) -> str:
    on_front, chosen = one["name"] in result["front"], one["name"] == result["chosen"]["name"]
    color = "#c33" if on_front else "#888" if one["status"] != "refused" else "#ddd"
    label = f'<text x="{x + 8:.1f}" y="{y + 4:.1f}">{html.escape(one["name"])}</text>' if on_front or chosen else ""
    return (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{7 if chosen else 4}" fill="{color}">'
            f"<title>{html.escape(one['name'])}</title></circle>{label}")  # fmt: skip

"""The report of `compress` as rows, one per step, and the losses of its steps that trained."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from deploytool.report.rows import Curve, Grid, Page

_HEADER = ("step", "seconds", "parameters", "not zero", "size MB", "metrics", "loss: first -> last")
_NUMBERS = frozenset({"seconds", "parameters", "not zero", "size MB"})
_NONE = "-"


def compression_page(report: Mapping[str, Any]) -> Page:
    """Whose the report is, what every step did and cost; raises what Python does where it is no such report."""
    steps = report["steps"]
    rows = (_row("before", None, report["before"], _NONE),
            *(_row(str(s["step"]), float(s["seconds"]), s["after"], _losses(s)) for s in steps))  # fmt: skip
    facts = (("recipe", str(report["recipe"])), ("seed", str(report["seed"])))
    curves = tuple(Curve(f"{number}. {step['step']}", _points(step["loss_curve"]))
                   for number, step in enumerate(steps, start=1) if "loss_curve" in step)  # fmt: skip
    grid = Grid(_HEADER, rows, _NUMBERS, tuple(_lines(report)))
    return Page(f"Compression of {report['model']}", facts, grid, curves)


def _row(name: str, seconds: float | None, measured: Mapping[str, Any], losses: str) -> tuple[str, ...]:
    metrics = ", ".join(f"{metric} {float(value):.6g}" for metric, value in measured["metrics"].items())
    took = _NONE if seconds is None else f"{seconds:.1f}"
    counts = str(int(measured["parameters"])), str(int(measured["nonzeros"]))
    return name, took, *counts, f"{measured['size_bytes'] / 1e6:.3f}", metrics or _NONE, losses


def _losses(step: Mapping[str, Any]) -> str:
    return f"{step['loss_first']:.6g} -> {step['loss_last']:.6g}" if "loss_curve" in step else _NONE


def _points(curve: Any) -> tuple[tuple[int, float], ...]:
    points = tuple((int(step), float(loss)) for step, loss in curve)
    if not points or not all(math.isfinite(loss) for _, loss in points):
        raise ValueError("a loss curve must hold finite numbers, and at least one")
    return points


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    if "stored_bytes" in report:
        yield (f"stored in {report['stored_bytes'] / 1e6:.3f} MB: zeros and equal bytes take little room in the file, "
               "and are counted in full above")  # fmt: skip
    for step in report["steps"]:
        reasons: dict[str, int] = {}
        for entry in step.get("skipped") or ():
            reasons[entry["reason"]] = reasons.get(entry["reason"], 0) + 1
        yield from (f"{step['step']}: {count} left as they were: {why}" for why, count in reasons.items())
        if "train_seconds" in step:
            yield (f"{step['step']}: {step['optimizer_steps']} optimizer steps in {step['train_seconds']:.1f} s, "
                   f"{step['items_per_second']:.0f} items/s, from step {step['resumed_from']} on")  # fmt: skip

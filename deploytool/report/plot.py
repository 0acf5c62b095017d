"""A loss over steps as the numbers of a drawing, for a page that has no script and no picture beside it."""

from __future__ import annotations

from dataclasses import dataclass

from deploytool.report.rows import Curve

WIDTH, HEIGHT = 640, 180
_EDGE = 4  # of the drawing, so that lines are not cut


@dataclass(frozen=True)
class Drawing:
    """Points as an SVG polyline takes them, and what the ends of the axes are."""

    title: str
    points: str
    width: int
    height: int
    highest: str
    lowest: str
    last_step: int


def draw(curve: Curve) -> Drawing:
    """The curve from its first to its last step, and from its smallest to its largest loss."""
    steps, losses = [step for step, _ in curve.points], [loss for _, loss in curve.points]
    low, high = min(losses), max(losses)
    across, up = max(steps[-1] - steps[0], 1), high - low or 1.0
    places = ((_EDGE + (step - steps[0]) / across * (WIDTH - 2 * _EDGE),
               HEIGHT - _EDGE - (loss - low) / up * (HEIGHT - 2 * _EDGE)) for step, loss in curve.points)  # fmt: skip
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Drawing(curve.title, text, WIDTH, HEIGHT, f"{high:.4g}", f"{low:.4g}", steps[-1])

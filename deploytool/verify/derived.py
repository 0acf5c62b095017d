"""Limits that follow from what a model's outputs do by themselves, and where each comes from.

A profile's limits hold for every model. A model that is ten thousand times steadier than they allow should be held to
what it can: the error may be some times what rounding alone does to the reference (lower/noise.py), never less than
what engines' own approximations cost, never more than the profile says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploytool.artifact import Artifact
from deploytool.difference import error_max
from deploytool.target import Limits

# Times the reference's own noise, and the least limit: both from clean exports, see docs/parity.md.
_HEADROOM = {"fp32": 16.0, "fp16": 8.0, "int8": 6.0}
LEAST = {"fp32": 512 * 2.0**-24, "fp16": 16 * 2.0**-11, "int8": 0.03}
_FIGURES = {"fp32": ("fp64", "shuffled"), "fp16": ("fp16",), "int8": ("int8",)}
_DYNAMIC = ("onnxruntime", "fbgemm", "inductor_int8")
_WORDS = {
    "fp64": "the same model in double precision",
    "shuffled": "sums in another order",
    "fp16": "the same model rounded to half precision",
    "int8": "the same model rounded to 7-bit weights and 8-bit inputs",
}


def arithmetic(artifact: Artifact) -> str:
    """What of the noise figures an artifact can be held to: static int8 has ranges that the noise does not simulate.

    Nor is it known how a model with learned grids may differ in floating point: which numbers between two codes fall to
    the other one changes with every order of sums.
    """
    if artifact.settings.get("input_grids") and artifact.precision == "fp32":
        return "learned grids"
    calibrated = artifact.settings.get("scheme") == "static" or "calibration" in artifact.settings  # some layers of it
    weights_only = artifact.settings.get("weights_only")  # rounds less than what is simulated
    dynamic = (artifact.backend in _DYNAMIC or weights_only) and not calibrated
    return artifact.precision if artifact.precision != "int8" or dynamic else "static int8"


def derived_limits(noise: Mapping[str, Any] | None, precision: str, limits: Limits) -> dict[str, dict[str, Any]]:
    """By output {"relative_error_max", "from", "noise"}; the profile's own where the noise is not known."""
    ceiling = error_max(limits.cosine_min)
    outputs: Mapping[str, Mapping[str, float]] = noise["outputs"] if noise else {}
    skipped = noise.get("skipped", {}) if noise else {}
    return {name: _derive(figures, precision, ceiling, skipped) for name, figures in outputs.items()}


def _derive(figures: Mapping[str, float], precision: str, ceiling: float, skipped: Mapping[str, str]) -> dict[str, Any]:
    known = {name: figures[name] for name in _FIGURES.get(precision, ()) if name in figures}
    if not known:
        why = next((skipped[name] for name in _FIGURES.get(precision, ()) if name in skipped), "it is not known")
        if precision not in _FIGURES:
            why = f"none is simulated for {precision}"
        return {"relative_error_max": ceiling, "noise": None,
                "from": f"the profile's cosine_min, without the reference's own noise: {why}"}  # fmt: skip
    size = max(known.values())
    limit, least = _HEADROOM[precision] * size, LEAST[precision]
    words = " and ".join(f"{_WORDS[name]} ({value:.2g})" for name, value in known.items())
    said = f"{_HEADROOM[precision]:g} times the reference's own noise: {words}"
    if limit < least:
        limit, said = least, f"the least for {precision} ({least:.2g}), more than {said}"
    if limit > ceiling:
        limit, said = ceiling, f"the profile's cosine_min, less than {said}"
    return {"relative_error_max": limit, "noise": size, "from": said}

"""Build settings that are chosen by measuring on this machine: `mixed`, `group` and `activations` = "measured".

Times are never twice the same, so what was measured is kept with the prepared model: building again without a change
gives the same artifact. Light: nothing heavy is imported here.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

from deploytool.artifact import versions
from deploytool.backends.base import Request
from deploytool.backends.engine import threads_to_use
from deploytool.backends.tables import OnnxRuntimeBuild
from deploytool.errors import EnvironmentLacking
from deploytool.processor import processor
from deploytool.storage import read_json, write_json
from deploytool.target import Target

# Decisions on products: int8, or fp32 for either reason.
INT8, SLOWER, GIVEN_BACK = "int8", "fp32: not faster in int8", "fp32: gains least for what it costs"
MEASURED = "measured"
ANY = "any"
_SAME = {"AMD64": "x86_64", "arm64": "aarch64"}
_NAMES = ("name", "description", "plain")  # of a profile: they change nothing that is measured


def opened_with(request: Request, options: OnnxRuntimeBuild) -> dict[str, Any]:
    """The settings that the request's artifact will be opened with."""
    level = "extended" if options.format == "ort" and options.optimization == "all" else options.optimization
    runtime = request.target.runtime
    return {"optimization": level, "without": list(options.without), "arena": options.arena, "flush": options.flush,
            "threads": threads_to_use(runtime.threads), "spinning": runtime.spinning}  # fmt: skip


def check_processor(target: Target) -> None:
    """Raise EnvironmentLacking DT402 for a profile that is for other processors than the one at hand."""
    here = _SAME.get(platform.machine(), platform.machine())
    wanted = target.device.architecture
    if wanted not in (ANY, here):
        raise EnvironmentLacking("DT402", f"what {target.name} gains must be measured on a processor of its "
                                 f"kind, {wanted} (this one is {here})",
                                 fix='build it there, or choose by hand what is "measured" in [build]')  # fmt: skip


def measured(request: Request, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `measure` finds, or found before for this profile, processor and ONNX Runtime; and where and how long."""
    about = {"cpu": _here(), "threads": settings["threads"]}
    file = request.kept / f"{_identity(request, about)}.json" if request.kept else None
    if file and file.is_file():
        known: dict[str, Any] = read_json(file)
        return known
    start = time.perf_counter()
    found = measure()
    found = {**about, "seconds": round(time.perf_counter() - start, 1), **found}
    if file:
        file.parent.mkdir(exist_ok=True)
        write_json(file, found)
    return found


def told(settings: Mapping[str, Any]) -> list[str]:
    """What a report has to say of an artifact with these settings: what was chosen by times of one machine."""
    table = settings.get("measured")
    if table is None:
        return []
    where = f"measured on {table['cpu']} with {table['threads']} threads; other processors may gain otherwise"
    if "candidates" in table:
        group, activations = (table["taken"][key] for key in ("group", "activations"))
        return [f'of {len(table["candidates"])} candidates group = {group} with activations = "{activations}" is the '
                f"quickest within the limits ({where})"]  # fmt: skip
    rows = table["operators"]
    slower, back = (sum(row["decision"] == why for row in rows) for why in (SLOWER, GIVEN_BACK))
    beyond = table["loss"] > table["loss_allowed"]
    return [f"of {len(rows)} groups of products {slower} are not faster in int8 and {back} gain too little for what "
            f"they cost: these stay fp32 ({where})",
            *([f"with all of them in fp32 the calibration feeds still lose {table['loss']:.3g} of cosine, and "
               f"{table['loss_allowed']:.3g} was aimed at: operators that are not weighed lose it"] if beyond else []),
            ]  # fmt: skip


def _identity(request: Request, about: Mapping[str, Any]) -> str:
    """A digest of what times and losses follow from, but for the prepared model and deploytool's own code."""
    profile = {key: value for key, value in request.target.to_json().items() if key not in _NAMES}
    key = [profile, about, versions(("onnxruntime",))]
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]


def _here() -> str:
    """The processor's name and steps: kernels differ by both."""
    here = processor()
    return " ".join([here.name or platform.machine(), *([f"({here.steps})"] if here.steps else [])])

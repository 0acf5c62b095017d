"""What TensorRT's engine inspector tells of an engine: its layers, their data types, and which were fused.

The inspector is asked of an engine that was opened, which takes a driver: without one nothing is told, and nothing
guessed. Its JSON: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

UNASKED = "not available: the engine's inspector needs a driver"
_TYPES = (("bf16", r"bf16|bfloat16"), ("fp8", r"fp8|e4m3|float8"), ("fp16", r"fp16|half|float16"),
          ("fp32", r"fp32|float"), ("int8", r"\bint8"), ("int4", r"\bint4"),
          ("other", r"int32|int64|bool|uint8|index"))  # fmt: skip
_SEPARATOR = re.compile(r"\x1e|\x1f")  # between the ONNX layers of one of the engine's


def summary(information: str) -> dict[str, Any]:
    """Counts of an engine's layers from the inspector's JSON.

    layers         how many there are
    by_precision   how many read each type first, or give it where they read nothing; "unknown" where it is not told
    fused          how many stand for several layers of the network, by their metadata or joined names

    A JSON that is none, or without layers, gives {"not_available": why}.
    """
    try:
        told = json.loads(information)["Layers"]
    except (ValueError, KeyError, TypeError) as error:
        return {"not_available": f"the inspector's answer has no layers ({type(error).__name__})"}
    if not told:
        return {"not_available": "the inspector named no layer"}
    kinds = Counter(_kind(layer) for layer in told)
    return {"layers": len(told), "by_precision": dict(sorted(kinds.items())), "fused": sum(map(_is_fused, told))}


def sentence(inspected: Mapping[str, Any] | None) -> str:
    """The summary in words."""
    if not inspected:
        return UNASKED
    if "not_available" in inspected:
        return str(inspected["not_available"])
    kinds = ", ".join(f"{count} in {kind}" for kind, count in inspected["by_precision"].items())
    return f"{inspected['layers']} layers ({kinds}), {inspected['fused']} of them fused"


def _kind(layer: Any) -> str:
    """Built without its details, an engine tells names alone."""
    if not isinstance(layer, dict):
        return "unknown"
    for tensor in (*layer.get("Inputs", ()), *layer.get("Outputs", ())):
        told = str(tensor.get("Format/Datatype", tensor.get("Datatype", ""))).lower()
        found = next((name for name, pattern in _TYPES if re.search(pattern, told)), None)
        if found:
            return found
    return "unknown"


def _is_fused(layer: Any) -> bool:
    if not isinstance(layer, dict):
        return " + " in str(layer)
    parts = [part for part in _SEPARATOR.split(str(layer.get("Metadata", ""))) if part]
    return len(parts) > 1 or " + " in str(layer.get("Name", ""))

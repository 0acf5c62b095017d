"""Which GPUs take which precision, known before anything is built. Light: nothing heavy is imported here.

From building with TensorRT-RTX 1.7 for each: Turing (SM75) has products of fp16 and int8 alone, and no bf16 or int4;
fp8 came with Ada (SM89). Capabilities are named as TensorRT does.
"""

from __future__ import annotations

import re

from deploytool.errors import UsageProblem
from deploytool.target import Target

_OLDEST = {"fp32": 80, "fp16": 75, "bf16": 80, "int8": 75, "fp8": 89, "int4": 80}


def check_devices(target: Target) -> None:
    """Raise UsageProblem DT202 where a compute capability of the profile has no products of its precision."""
    rest = str(target.build.get("rest", "fp32"))
    parts = (target.precision, rest) if target.precision in ("int8", "fp8", "int4") else (target.precision,)
    oldest, why = max((_OLDEST.get(part, 0), part) for part in parts)
    older = [name for name in target.device.compute_capabilities
             if (number := re.fullmatch(r"SM(\d+)", name)) and int(number[1]) < oldest]  # fmt: skip
    if older:
        said = f"precision = {target.precision!r}" + (f" with rest = {why!r}" if why != target.precision else "")
        raise UsageProblem("DT202", f"device.compute_capabilities must be SM{oldest} or newer for {said} "
                                    f"(got {', '.join(older)})",
                           fix=f"take {', '.join(older)} out of the profile, or {_other(target, older)}")  # fmt: skip


def _other(target: Target, older: list[str]) -> str:
    """What these capabilities do take."""
    turing = any(int(name.removeprefix("SM")) < _OLDEST["fp32"] for name in older)
    if target.precision == "int8":
        return 'set rest = "fp16" in [build]'
    return 'choose precision = "fp16"' if turing else 'choose precision = "int8" or "fp16"'

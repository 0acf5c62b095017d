"""What of a profile does something: a setting that the chosen precision does not use is refused, not passed over.

Light: nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from deploytool import settings
from deploytool.settings import Table, line_of
from deploytool.target import Target

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "eager": ("fp32",),
    "torchscript": ("fp32",),
    "inductor": ("fp32",),
    "inductor_int8": ("int8",),
    "fbgemm": ("int8",),
    "executorch": ("fp32", "int8"),
    "onnxruntime": ("fp32", "fp16", "int8", "int4"),
    "openvino": ("fp32", "int8", "int4"),
    "tensorrt": ("fp32", "fp16", "bf16", "int8", "fp8", "int4"),
}


def _whole(precision: str, build: Mapping[str, Any]) -> str:
    return precision


def _schemes(default: str, quantized: str = "int8") -> Callable[[str, Mapping[str, Any]], str]:
    """Of int8 the scheme too."""

    def way(precision: str, build: Mapping[str, Any]) -> str:
        return f'{precision} with scheme = "{build.get("scheme", default)}"' if precision == quantized else precision

    return way


def _openvino(precision: str, build: Mapping[str, Any]) -> str:
    return f"{precision} with weights_only" if precision == "int8" and build.get("weights_only") else precision


def _tensorrt(precision: str, build: Mapping[str, Any]) -> str:
    rest = build.get("rest", "fp32") != "fp32" and precision in ("int8", "fp8", "int4")
    return f'{precision} with rest = "{build["rest"]}"' if rest else precision


# In which way of building: the precision, and what of `[build]` divides it further.
_WAYS: Mapping[str, Callable[[str, Mapping[str, Any]], str]] = {
    "fbgemm": _schemes("auto"), "inductor_int8": _schemes("auto"), "onnxruntime": _schemes("dynamic"),
    "openvino": _openvino, "tensorrt": _tensorrt,
}  # fmt: skip

_DYNAMIC, _STATIC, _AUTO, _WEIGHTS = (f'int8 with scheme = "{s}"' for s in ("dynamic", "static", "auto", "weights"))
_CALIBRATED = tuple(f'{p} with rest = "{r}"' for p in ("int8", "fp8", "int4") for r in ("fp16", "bf16"))
_ROUNDED = ("int8", "fp8", "int4", *_CALIBRATED)
_NOT_OF_ROUNDING = frozenset({
    "scheme", "engine", "method", "cpu", "keep_program", "optimization", "without", "arena", "flush", "format", "hint",
    "stateful", "profile", "rest",
})  # fmt: skip
_BUILT = ("keep_fp32", "exclude", "samples")

# The ways in which a setting does something; those that are not named here do in all.
_USED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "fbgemm": {
        **dict.fromkeys(("keep_fp32", "samples", "recurrent", "embeddings"), (_DYNAMIC, _AUTO)),
        "calibration": (_STATIC, _AUTO),
    },
    "inductor_int8": {
        **dict.fromkeys(("keep_fp32", "samples"), (_DYNAMIC, _AUTO)),
        **dict.fromkeys(("calibration", "calibration_samples"), (_STATIC, _AUTO)),
    },
    "executorch": dict.fromkeys(("scheme", "exclude", "calibration_samples"), ("int8",)),
    "onnxruntime": {
        "scheme": (_DYNAMIC, _STATIC, _WEIGHTS),
        "fuse": ("fp32", _WEIGHTS, "int4"),
        "fp32_ops": ("fp16",),
        **dict.fromkeys(("op_types", "reduce_range", "mixed", "keep_fp32", "samples"), (_DYNAMIC, _STATIC)),
        "exclude": (_DYNAMIC, _STATIC, _WEIGHTS, "int4"),
        "calibration": (_STATIC,),
        "calibration_samples": (_STATIC, "fp16"),
        **dict.fromkeys(("group", "activations"), (_WEIGHTS, "int4")),
        "int8_share": ("int4",),
    },
    "openvino": {
        "weights_only": ("int8", "int8 with weights_only", "int4"),
        "activation_group": ("int8 with weights_only", "int4"),
        **dict.fromkeys(("method", "group_size", "int4_share"), ("int4",)),
        **dict.fromkeys(("scheme", "preset", "max_drop", *_BUILT), ("int8",)),
        "calibration_samples": ("int8", "int4"),
    },
    "tensorrt": {
        "fp32_ops": ("fp16", "bf16", *_CALIBRATED),
        "calibration": tuple(way for way in _ROUNDED if not way.startswith("int4")),
        **dict.fromkeys(("rest", "calibration_samples", *_BUILT), _ROUNDED),
        "group": tuple(way for way in _ROUNDED if way.startswith("int4")),
    },
}  # fmt: skip


def does_something(target: Target, key: str) -> bool:
    """Whether a setting of `[build]` is used in the way in which the profile builds."""
    ways = _USED.get(target.backend, {}).get(key)
    return ways is None or _WAYS.get(target.backend, _whole)(target.precision, target.build) in ways


def unused_beside_grids(options: Table, but: tuple[str, ...] = ()) -> dict[str, str]:
    """{"note": ...} where a profile asks for a rounding that the model's own learned scales take the place of.

    Only the model tells: its scales are taken, and so nothing is refused. `but` names what is used all the same.
    """
    fields = type(options).model_fields
    idle = [name for name in fields if name not in _NOT_OF_ROUNDING and name not in but
            and getattr(options, name) != fields[name].get_default(call_default_factory=True)]  # fmt: skip
    if not idle:
        return {}
    return {"note": f"the scales that the model has learned were taken: {', '.join(idle)} of the profile did nothing"}


def check_used(target: Target, options: Table, *, text: str = "", where: str) -> None:
    """UsageProblem DT202 for a precision that the backend lacks, and for every setting that would do nothing.

    `options` is the profile's `[build]`: what has its default there asks for nothing. `text` is that of the profile's
    file, for line numbers.
    """
    problems = [*_precision(target, text)]
    if not problems:
        way = _WAYS.get(target.backend, _whole)(target.precision, target.build)
        for key, field in type(options).model_fields.items():
            asked = getattr(options, key) != field.get_default(call_default_factory=True)
            if asked and not does_something(target, key):
                ways = [one for one in _USED[target.backend][key]
                        if one == (whole := one.partition(" with ")[0]) or whole not in _USED[target.backend][key]]
                problems.append((line_of(text, ("build", key)), f"'build.{key}' does nothing in {way}: take it out (it "
                                 f"is of {', '.join(ways)})"))  # fmt: skip
    if not target.runtime.spinning and target.backend != "onnxruntime":
        problems.append((line_of(text, ("runtime", "spinning")), "'runtime.spinning' does nothing but in ONNX Runtime: "
                         "take it out"))  # fmt: skip
    if target.device.compute_capabilities and target.backend != "tensorrt":
        problems.append((line_of(text, ("device", "compute_capabilities")), "'device.compute_capabilities' does "
                         "nothing but in TensorRT: take it out"))  # fmt: skip
    if problems:
        raise settings.complain(where, [f"{where}:{line}: {said}" if line else f"{where}: {said}"
                                        for line, said in sorted(problems)])  # fmt: skip


def _precision(target: Target, text: str) -> list[tuple[int, str]]:
    if target.precision in (known := PRECISIONS.get(target.backend, (target.precision,))):
        return []
    *others, last = known
    words = f"{', '.join(others)} or {last}" if others else last
    return [(line_of(text, ("precision",)), f"'precision' must be {words} for the backend {target.backend} "
             f"(got {target.precision!r})")]  # fmt: skip

"""Which of torch's engines computes int8 layers, chosen before anything is packed for it: a file holds plain weights.

"x86" and "onednn" call oneDNN's kernels where "fbgemm" has its own: "x86" for convolutions on CPUs with VNNI alone.
Measurements are in docs/targets.md. The self-test of bundles has these few lines too, since it ships alone.
https://docs.pytorch.org/docs/stable/quantization.html ("Backend/Hardware Support")
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from deploytool.backends import saturation
from deploytool.errors import EnvironmentLacking
from deploytool.processor import processor

_AUTO = ("fbgemm", "qnnpack")  # of x86 CPUs, of ARM
_OF_ONEDNN = ("x86", "onednn")


def use_engine(wanted: str, weight_bits: int) -> str:
    """For building: make torch use the engine that a profile names, or the one of this CPU for "auto"; its name.

    Raises EnvironmentLacking DT402 where torch has no such engine here, or 8-bit weights would saturate in it.
    """
    here = torch.backends.quantized.supported_engines
    chosen = _first(here) if wanted == "auto" else wanted
    if chosen not in here:
        raise EnvironmentLacking("DT402", f"torch must have the engine {wanted if chosen else ' or '.join(_AUTO)} "
                                          f"(got {', '.join(here)})",
                                 fix="choose another int8 target: ort-int8, openvino-int8")  # fmt: skip
    _check_saturation(chosen, weight_bits)
    torch.backends.quantized.engine = chosen
    return chosen


def use_engine_of(settings: Mapping[str, Any]) -> str:
    """For opening: the engine that an artifact with these settings was built with, or that of another kind of CPU."""
    here = torch.backends.quantized.supported_engines
    built = str(settings.get("engine", "fbgemm"))
    return use_engine(built if built in here else "auto", int(settings.get("weight_bits", 7)))


def _first(here: Collection[str]) -> str:
    return next((name for name in _AUTO if name in here), "")


def _check_saturation(engine: str, weight_bits: int) -> None:
    if engine in _OF_ONEDNN and weight_bits > 7 and not saturation.has_vnni(processor().flags):
        raise EnvironmentLacking("DT402", f"the CPU must have VNNI for weights of 8 bits in the engine {engine!r}, "
                                 "whose sums are cut off without (it has none)",
                                 fix='build it with weight_bits = 7, or engine = "auto"')  # fmt: skip

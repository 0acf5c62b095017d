"""The machine's noise floor: one artifact against itself, in two processes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from deploytool.bench.blocks import medians

ITSELF = "itself"


def noise_floor(timed: Mapping[str, Any]) -> dict[str, Any]:
    """What a comparison of an artifact with itself says of the machine; `timed` is what `compare` gave.

    block_noise   standard deviation of ln(ratio) over the undisturbed blocks
    detectable    the smallest relative difference that this machine shows in as many blocks: half of the 95 % interval;
                  None where there were too few for one
    run_noise     distance between the quartiles of the blocks' medians, relative to their median
    """
    blocks = [b for b in timed["block_medians_ms"][ITSELF] if b["used"]] or timed["block_medians_ms"][ITSELF]
    ratios = [float(np.mean(np.log(b["reference"])) - np.mean(np.log(b["candidate"]))) for b in blocks]
    interval = timed["against"][ITSELF]["speedup_ci"]
    times = medians([b["candidate"] for b in blocks])
    first, middle, third = np.quantile(times, [0.25, 0.5, 0.75])
    return {
        "block_noise": float(np.std(ratios, ddof=1)) if len(ratios) > 1 else None,
        "detectable": math.sqrt(interval[1] / interval[0]) - 1 if interval else None,
        "run_noise": float((third - first) / middle),
        "verdict": timed["against"][ITSELF]["verdict"],
    }

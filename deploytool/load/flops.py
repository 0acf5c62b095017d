"""How many floating-point operations one run of a model takes: counted on the eager module."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from deploytool.cases import Case
from deploytool.load.model import open_source
from deploytool.source import ModelRef


def flops_job(ref: Mapping[str, str], case: str) -> int:
    """Operations of matrix products, convolutions and attention for the inputs of a case; an addition counts as one.

    Element-wise operations are not counted, and neither are LSTMs that run as one kernel.
    Source: https://docs.pytorch.org/docs/stable/generated/torch.utils.flop_counter.FlopCounterMode.html
    """
    source = open_source(ModelRef(**ref))
    feeds = Case.load(Path(case)).inputs
    tensors = [torch.from_numpy(feeds[name].copy()) for name in source.signature.input_names]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        source.flat(*tensors)
    return int(counter.get_total_flops())

"""Which layers Inductor's int8 kernels on x86 CPUs take, and how they round: a quantizer for PT2E.

Static layers follow torchao's own recipe for oneDNN, which fuses sums, ReLU and pooling between whole-number layers.
Importing it also tells Inductor the patterns of those kernels.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.nn import functional

from deploytool.backends.fbgemm_static import between_percentiles
from deploytool.backends.pt2e import layer_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch warns of its own parts while they are imported
    from torchao.quantization.pt2e.observer import (
        HistogramObserver,
        MinMaxObserver,
        PerChannelMinMaxObserver,
        PlaceholderObserver,
    )
    from torchao.quantization.pt2e.quantizer import QuantizationSpec, Quantizer
    from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY
    from torchao.quantization.pt2e.quantizer.utils import QuantizationConfig
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        _X86InductorQuantizationAnnotation,
    )

LINEAR = torch.ops.aten.linear.default
CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default)
_PASSING = (functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d, torch.cat, torch.flatten)
_SHARE = 1e-4  # of the values that may lie outside of a percentile range on either side


class PercentileObserver(MinMaxObserver):  # type: ignore[misc]
    """Range between two percentiles of each batch, widened from batch to batch."""

    def forward(self, x_orig: torch.Tensor) -> torch.Tensor:
        """Record a batch of any shape; the values themselves are passed on unchanged."""
        if x_orig.numel():
            super().forward(between_percentiles(x_orig, _SHARE))
        return x_orig


OBSERVERS: dict[str, Any] = {
    "histogram": HistogramObserver,
    "min-max": MinMaxObserver,
    "percentile": PercentileObserver,
}


@dataclass(frozen=True)
class Plan:
    """What becomes of each layer, by the names that the source gives them.

    dynamic, static   layers that are rounded so; all others stay as they are
    passing           whether pooling and joining between static layers are done in whole numbers too
    calibration       one of OBSERVERS
    """

    dynamic: Collection[str]
    static: Collection[str]
    passing: bool
    calibration: str
    weight_bits: int


class InductorQuantizer(Quantizer):  # type: ignore[misc]
    """Rounds the layers of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan

    def annotate(self, model: GraphModule) -> GraphModule:
        """Mark what is rounded: dynamic layers and those that stay here, the others by torchao's recipe."""
        rounded = _config(self.plan, dynamic=True)
        for node in model.graph.nodes:
            if node.target not in (LINEAR, *CONVOLUTIONS):
                continue
            layer = layer_of(node)
            if layer in self.plan.dynamic and node.target is LINEAR:
                _mark(node, {node.args[0]: rounded.input_activation, node.args[1]: rounded.weight})
            elif layer not in self.plan.static:
                _mark(node, {})
        recipe, config = X86InductorQuantizer(), _config(self.plan, dynamic=False)
        kinds = (functional.conv1d, functional.conv2d, functional.linear)
        for kind in (*kinds, *_PASSING) if self.plan.passing else kinds:
            recipe.set_function_type_qconfig(kind, config)
        annotated: GraphModule = recipe.annotate(model)
        return annotated

    def validate(self, model: GraphModule) -> None:
        """Every marked node is one of those that the kernels take."""


def _mark(node: Node, rounded: dict[Any, Any]) -> None:
    node.meta[Q_ANNOTATION_KEY] = _X86InductorQuantizationAnnotation(input_qspec_map=rounded, _annotated=True)


def _config(plan: Plan, dynamic: bool) -> QuantizationConfig:
    observer = PlaceholderObserver if dynamic else OBSERVERS[plan.calibration]
    activation = QuantizationSpec(
        dtype=torch.uint8, quant_min=0, quant_max=255, qscheme=torch.per_tensor_affine, is_dynamic=dynamic,
        observer_or_fake_quant_ctr=observer,
    )  # fmt: skip
    high = 2 ** (plan.weight_bits - 1) - 1
    weight = QuantizationSpec(
        dtype=torch.int8, quant_min=-high - 1, quant_max=high, qscheme=torch.per_channel_symmetric, ch_axis=0,
        observer_or_fake_quant_ctr=PerChannelMinMaxObserver,
    )  # fmt: skip
    return QuantizationConfig(activation, activation, weight, None, False)

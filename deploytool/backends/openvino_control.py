"""Static int8 of an OpenVINO model within a bound on the model's own metric.

NNCF quantizes, evaluates, and while the metric has lost more than it may, takes the layers that cost most back to fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import nncf
import openvino as ov

from deploytool.backends.base import Request
from deploytool.backends.engine import EngineRunner
from deploytool.errors import BackendFailed, InputRefused
from deploytool.load.model import open_hooks
from deploytool.load.predict import tensor_predict
from deploytool.signature import Feeds

Metric = Callable[[Any], float]


def metric_of(request: Request, opened: Callable[[Any], EngineRunner]) -> Metric:
    """What computes the model's first metric of a model, larger when better.

    InputRefused DT313 for a model without evaluate().
    """
    hooks = open_hooks(request.ref) if request.ref is not None else None
    if hooks is None or hooks.evaluate is None:
        raise InputRefused("DT313", "build.max_drop must have a model with evaluate() (it has none)",
                           fix="leave max_drop out, or add evaluate() to the model file")  # fmt: skip
    evaluate, lower = hooks.evaluate, hooks.lower_is_better

    def metric(model: Any) -> float:
        with opened(model) as runner:
            name, value = next(iter(evaluate(tensor_predict(runner)).items()))
        return -float(value) if name in lower else float(value)

    return metric


def within_drop(
    model: ov.Model, feeds: list[Feeds], metric: Metric, max_drop: float, settings: dict[str, Any]
) -> ov.Model:
    """The quantized model whose metric is at most `max_drop` of its own value below the fp32 model's."""
    allowed = max_drop * abs(metric(model))

    def validate(candidate: Any, data: Iterable[Any]) -> tuple[float, None]:
        return metric(candidate), None

    try:
        return nncf.quantize_with_accuracy_control(
            model, nncf.Dataset(feeds), nncf.Dataset(feeds), validate, max_drop=allowed,
            drop_type=nncf.DropType.ABSOLUTE, subset_size=len(feeds), **settings,
        )  # fmt: skip
    except RuntimeError as error:
        raise BackendFailed("DT504", f"NNCF must quantize within max_drop (got: {error})"[:2000]) from error

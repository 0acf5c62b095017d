"""Static int8 of an OpenVINO model with NNCF's post-training quantization.

`overflow_fix` halves the range of all weights: products of full 8-bit weights saturate silently in the AVX2 kernels of
CPUs without VNNI. Attention needs NNCF's transformer scheme (smoothed activations, softmax left alone): without it
MiniLM's cosine falls from 0.99 to 0.04.
"""

from __future__ import annotations

import itertools
from typing import Any

import nncf
import numpy as np
import onnx
import openvino as ov
from nncf.quantization.range_estimator import RangeEstimatorParametersSet

from deploytool.backends import sensitivity, tables
from deploytool.backends.base import Request, portable_of
from deploytool.backends.onnx_products import products_to_keep, with_products
from deploytool.backends.openvino import CompiledRunner, compile_ir
from deploytool.backends.openvino_control import Metric, metric_of, within_drop
from deploytool.backends.openvino_scalars import move_scalars
from deploytool.errors import BackendFailed, InputRefused, UsageProblem, nearest
from deploytool.signature import Feeds

_PRESETS = {"mixed": nncf.QuantizationPreset.MIXED, "performance": nncf.QuantizationPreset.PERFORMANCE}
_NO_SMOOTHING = nncf.AdvancedSmoothQuantParameters(convolution=-1, matmul=-1)
_ESTIMATORS = {"mean": RangeEstimatorParametersSet.MEAN_MINMAX, "min-max": RangeEstimatorParametersSet.MINMAX}
_MANY_FEEDS = 16
_QUANTIZED = "quantized graph"
_FIXES = {_QUANTIZED: "name the nodes that it cannot take in build.exclude, or choose openvino-dynamic-int8, which "
                      "leaves activations in floating point"}  # fmt: skip
_GOOD_ENOUGH_SHARE = 0.5  # of the profile's allowed loss of cosine: a scheme that stays within ends the search


def quantize(model: ov.Model, request: Request, options: tables.OpenVinoBuild) -> tuple[ov.Model, dict[str, Any]]:
    """The quantized model and what was done; raises InputRefused when nothing became int8."""
    feeds = sensitivity.spread(request.calibration(), options.calibration_samples)
    if not feeds:
        raise InputRefused("DT303", "calibration must have at least one sample (got none)")
    kept = [*_checked(options.exclude, model), *_kept(model, request, options)]
    scheme, ranges, quantized = _best(model, request, options, feeds, kept)
    if options.max_drop is not None:
        metric = metric_of(request, lambda candidate: _opened(candidate, request))
        quantized = _quantize(model.clone(), feeds, options, scheme, kept, ranges, metric)
    count = sum(op.get_type_name() == "FakeQuantize" for op in quantized.get_ops())
    if not count:
        raise InputRefused("DT310", "the graph must hold operators that NNCF quantizes (got none)",
                           fix="choose an fp32 target")  # fmt: skip
    done = {"scheme": scheme, "ranges": ranges, "kept_fp32": kept, "calibration_feeds": len(feeds),
            "quantizers": count, "weight_bits": 7, "max_drop": options.max_drop}  # fmt: skip
    return quantized, done


def _best(
    model: ov.Model, request: Request, options: tables.OpenVinoBuild, feeds: list[Feeds], kept: list[str]
) -> tuple[str, str, ov.Model]:
    """Scheme, ranges and model of the first that is good enough, else of the one that loses least.

    What the engine does not take is passed over, as the plain scheme of Fourier mixing; BackendFailed where it takes
    none.
    """
    best: tuple[float, str, str, ov.Model] | None = None
    refused: BackendFailed | None = None
    reference = _outputs(model, feeds)
    for ranges, scheme in itertools.product(_ranges(len(feeds)), _schemes(model, options)):
        quantized = _quantize(model.clone(), feeds, options, scheme, kept, ranges)
        try:
            outputs = _outputs(quantized, feeds, _QUANTIZED)
        except BackendFailed as error:
            refused = error
            continue
        # Of all numbers of a feed, in which large samples count for more, and of the worst one alone.
        loss = max(max(map(of, reference, outputs)) for of in (sensitivity.output_loss, sensitivity.sample_loss))
        if best is None or loss < best[0]:
            best = (loss, scheme, ranges, quantized)
        if loss <= _GOOD_ENOUGH_SHARE * (1.0 - request.target.parity.cosine_min):
            break
    if best is None:
        assert refused is not None  # there is at least one scheme
        raise refused
    return best[1:]


def _opened(candidate: ov.Model | ov.CompiledModel, request: Request) -> CompiledRunner:
    """A model that NNCF asks the metric of, for running here."""
    compiled = compile_ir(candidate, 1) if isinstance(candidate, ov.Model) else candidate
    return CompiledRunner(compiled, request.signature)


def _schemes(model: ov.Model, options: tables.OpenVinoBuild) -> list[str]:
    if options.scheme != "auto":
        return [options.scheme]
    # Without attention the transformer scheme is the plain one with less in int8 beside the products: MobileNetV2 and
    # ConvNeXt with random weights lose 0.19 and 0.02 of the cosine by the plain one, and below 0.01 by this.
    return ["transformer", "unsmoothed"] if has_attention(model) else ["plain", "transformer", "unsmoothed"]


def _ranges(feeds: int) -> list[str]:
    """How activations' ranges follow from the feeds, the likelier first.

    The mean of each feed's smallest and largest number cuts off what single outliers reach, and with few feeds of
    different sizes much more: small models came out at a cosine of 0.87, and of 0.999 with the extremes of all.
    """
    return ["min-max", "mean"] if feeds < _MANY_FEEDS else ["mean", "min-max"]


def _quantize(
    model: ov.Model, feeds: list[Feeds], options: tables.OpenVinoBuild, scheme: str, kept: list[str], ranges: str,
    metric: Metric | None = None,
) -> ov.Model:  # fmt: skip
    advanced = nncf.AdvancedQuantizationParameters(
        overflow_fix=nncf.OverflowFix.ENABLE, activations_range_estimator_params=_ESTIMATORS[ranges]
    )
    if scheme == "unsmoothed":
        advanced.smooth_quant_alphas = _NO_SMOOTHING
    settings: dict[str, Any] = {
        "preset": _PRESETS[options.preset],
        "model_type": None if scheme == "plain" else nncf.ModelType.TRANSFORMER,
        "ignored_scope": nncf.IgnoredScope(names=kept) if kept else None,
    }
    if metric is not None and options.max_drop is not None:
        quantized = within_drop(model, feeds, metric, options.max_drop,
                                {**settings, "advanced_quantization_parameters": advanced})  # fmt: skip
    else:
        try:
            quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), advanced_parameters=advanced,
                                      **settings)  # fmt: skip
        except RuntimeError as error:
            raise BackendFailed("DT504", f"NNCF must quantize the model (got: {error})"[:2000]) from error
    move_scalars(quantized)
    return quantized


def _outputs(model: ov.Model, feeds: list[Feeds], what: str = "graph") -> list[list[np.ndarray]]:
    """The model's outputs on the feeds, compiled for this CPU: saturation and rounding are part of the answer.

    BackendFailed DT504 where the engine does not take it.
    """
    try:
        compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return [[array.copy() for array in compiled(dict(one)).values()] for one in feeds]
    except RuntimeError as error:
        raise BackendFailed("DT504", f"OpenVINO must compile and run the {what} (got: {_reason(error)})",
                            detail=str(error).splitlines()[:5], fix=_FIXES.get(what)) from error  # fmt: skip


def _reason(error: RuntimeError) -> str:
    """The line of OpenVINO's message that says what went wrong; the others are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("Exception from")]
    return (said or lines or [type(error).__name__])[0][:500]


def _kept(model: ov.Model, request: Request, options: tables.OpenVinoBuild) -> list[str]:
    """Names, in OpenVINO's graph, of the products that stay fp32."""
    graph = with_products(onnx.load(portable_of(request).main_file))
    there = {op.get_friendly_name() for op in model.get_ops()}
    kept = []
    for name in products_to_keep(graph, request, options, bits=7):
        # The importer calls the product of a Gemm "NAME/WithoutBiases"; our own split of it is "NAME_MatMul".
        kept += [n for n in (name, f"{name.removesuffix('_MatMul')}/WithoutBiases") if n in there][:1]
    return kept


def _checked(names: tuple[str, ...], model: ov.Model) -> tuple[str, ...]:
    there = [op.get_friendly_name() for op in model.get_ops()]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name nodes of the graph (got {', '.join(unknown)})",
                           detail=[nearest(name, there) for name in unknown[:5]])  # fmt: skip
    return names


def has_attention(model: ov.Model) -> bool:
    """Whether some softmax feeds a matrix product, directly or through reshaping."""
    passing = {"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Convert", "Concat", "Split", "VariadicSplit", "Select"}
    ahead = [op for op in model.get_ops() if op.get_type_name() == "Softmax"]
    seen: set[str] = set()
    while ahead:
        op = ahead.pop()
        if op.get_type_name() == "MatMul":
            return True
        if op.get_friendly_name() in seen or (seen and op.get_type_name() not in (*passing, "Softmax")):
            continue
        seen.add(op.get_friendly_name())
        ahead += [target.get_node() for output in op.outputs() for target in output.get_target_inputs()]
    return any(op.get_type_name() == "ScaledDotProductAttention" for op in model.get_ops())

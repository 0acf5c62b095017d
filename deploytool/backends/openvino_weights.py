"""Weights of an OpenVINO model in 8 or 4 bits with NNCF; activations stay floating point, or are rounded as they come.

Where the CPU multiplies bytes, the engine rounds the activations of such products in groups of a row, whose scale it
finds as it runs: nothing is calibrated, and no outlier of another row spoils a scale. Wider groups mean fewer scales;
a product whose width the group does not divide is computed in floating point.

ONNX keeps the weight of a product as [in, out]. NNCF's data-aware ways (scale estimation, AWQ, GPTQ) read it as
[out, in]: on a graph that comes from ONNX they fail or ruin the model without a word. Weights are turned first.
Operator: https://docs.openvino.ai/2026/documentation/openvino-ir-format/operation-sets/operation-specs/matrix/matmul-1.html
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13

from deploytool.backends import tables
from deploytool.backends.base import Request
from deploytool.errors import BackendFailed, InputRefused

_MODES = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_ASYM}
_LEAST_GROUP = 16  # fewer would be slower than floating point
_METHODS: dict[str, dict[str, bool]] = {
    "plain": {},
    "scale-estimation": {"scale_estimation": True},
    "awq": {"awq": True, "scale_estimation": True},
    "gptq": {"gptq": True},
}
# What NNCF's AWQ looks for before a product, itself or times another tensor; a GELU is not among them.
_ACTIVATIONS = ("Relu", "Clamp", "Elu", "PRelu", "Sigmoid", "HSigmoid", "HardSigmoid", "Swish", "HSwish", "Selu")
_NO_AWQ = ("AWQ had nothing to do, the weights are those of scale estimation: no product of 4-bit weights comes right "
           "after a ReLU, SiLU or sigmoid, or after a product that one of those or another tensor scales")  # fmt: skip


def compress_weights(
    model: ov.Model, request: Request, options: tables.OpenVinoBuild
) -> tuple[ov.Model, dict[str, Any]]:
    """The model with compressed weights and what was done; raises InputRefused when no weight could be compressed."""
    precision = request.target.precision
    turned = turn_weights(model)
    settings: dict[str, Any] = {"mode": _MODES[precision]}
    if precision == "int4":
        feeds = list(itertools.islice(request.calibration(), options.calibration_samples))
        settings |= {"group_size": options.group_size, "ratio": options.int4_share, "dataset": nncf.Dataset(feeds),
                     "subset_size": len(feeds), **_METHODS[options.method]}  # fmt: skip
        settings["advanced_parameters"] = nncf.AdvancedCompressionParameters(
            # Widths that no such group divides: smaller groups, or 8 bits where even those do not.
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        )
    try:
        compressed = nncf.compress_weights(model, **settings)
    except (RuntimeError, ValueError, nncf.ValidationError) as error:
        raise BackendFailed("DT504", f"NNCF must compress the weights (got: {error})"[:2000]) from error
    bits = stored_bits(compressed)
    if not bits.keys() & {"int8", "int4"}:
        raise InputRefused("DT310", "the graph must hold weights that NNCF compresses (got none)",
                           fix="choose an fp32 target")  # fmt: skip
    group = widest_group(compressed) if options.activation_group == "widest" else options.activation_group
    if group is not None:
        compressed.set_rt_info(str(group), ["runtime_options", "DYNAMIC_QUANTIZATION_GROUP_SIZE"])
    done: dict[str, Any] = {"weights_only": True, "weight_elements": bits, "activation_group": group}
    if precision == "int4" and options.method == "awq":
        done |= {"awq_products": (count := awq_products(compressed))} | ({} if count else {"note": _NO_AWQ})
    if precision == "int4":
        done |= {"method": options.method, "group_size": options.group_size, "int4_share": options.int4_share,
                 "calibration_feeds": settings["subset_size"], "turned_weights": turned}  # fmt: skip
    return compressed, done


def awq_products(compressed: ov.Model) -> int:
    """How many products of 4-bit weights are where AWQ moves outliers from activations to weights."""
    return sum(_is_scaled(op.input_value(0).get_node()) for op in compressed.get_ops()
               if op.get_type_name() == "MatMul" and _has_few_bits(op))  # fmt: skip


def _is_scaled(before: ov.Node) -> bool:
    if before.get_type_name() != "Multiply":
        return before.get_type_name() in _ACTIVATIONS
    kinds = [value.get_node().get_type_name() for value in before.input_values()]
    return any(kind in (*_ACTIVATIONS, "MatMul") for kind in kinds)


def _has_few_bits(product: ov.Node) -> bool:
    """Whether the right side is made of constants alone, 4-bit codes among them."""
    waiting = [product.input_value(1).get_node()] if _has_weight(product) else []
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Constant" and node.get_output_element_type(0).get_type_name() in ("u4", "i4"):
            return True
        waiting += [value.get_node() for value in node.input_values()]
    return False


def widest_group(model: ov.Model) -> int | None:
    """The most activations of a row that every product with weights can share a scale of; None: too few for the engine.

    Products of two tensors that are both computed do not count.
    """
    group = math.gcd(*(_width(op) for op in model.get_ops() if op.get_type_name() == "MatMul" and _has_weight(op)))
    return group if group >= _LEAST_GROUP else None


def _has_weight(product: ov.Node) -> bool:
    """Whether the right side comes from constants alone: through what turns codes into numbers."""
    waiting = [product.input_value(1).get_node()]
    while waiting:
        node = waiting.pop()
        if node.get_type_name() == "Parameter" or node.get_type_name() == "ReadValue":
            return False
        waiting += [value.get_node() for value in node.input_values()]
    return True


def _width(product: ov.Node) -> int:
    shape = product.input_value(1).get_partial_shape()
    axis = shape[-1] if product.get_attributes()["transpose_b"] else shape[-2]
    return int(axis.get_length())


def turn_weights(model: ov.Model) -> int:
    """Store every constant [in, out] right side of a product as [out, in], in place; returns how many."""
    turned = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or node.get_attributes()["transpose_b"]:
            continue
        weight = node.input_value(1).get_node()
        if weight.get_type_name() != "Constant" or len(weight.get_output_shape(0)) != 2:
            continue
        constant = opset13.constant(np.ascontiguousarray(weight.data.T))
        constant.set_friendly_name(weight.get_friendly_name())
        product = opset13.matmul(node.input_value(0), constant, node.get_attributes()["transpose_a"], True)
        name = node.get_friendly_name()
        names = node.output(0).get_names()
        node.output(0).replace(product.output(0))
        product.set_friendly_name(name)
        product.output(0).set_names(names)  # an output of the model is found by it
        turned += 1
    model.validate_nodes_and_infer_types()
    return turned


def stored_bits(model: ov.Model) -> dict[str, int]:
    """Elements of all constants by how they are stored: "int4", "int8", "float", "other"."""
    kinds = {"u4": "int4", "i4": "int4", "u8": "int8", "i8": "int8", "f32": "float", "f16": "float"}
    found: dict[str, int] = {}
    for op in model.get_ops():
        if op.get_type_name() == "Constant":
            output = op.output(0)
            kind = kinds.get(output.get_element_type().get_type_name(), "other")
            found[kind] = found.get(kind, 0) + int(np.prod(output.get_shape()))
    return found

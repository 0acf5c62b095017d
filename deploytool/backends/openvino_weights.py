"""Weights of an OpenVINO model in 8 or 4 bits with NNCF; activations stay floating point.

ONNX keeps the weight of a product as [in, out]. NNCF's data-aware ways (scale estimation, AWQ, GPTQ) read it as
[out, in]: on a graph that comes from ONNX they fail or ruin the model without a word. Weights are turned first.
Operator: https://docs.openvino.ai/2026/documentation/openvino-ir-format/operation-sets/operation-specs/matrix/matmul-1.html
"""

from __future__ import annotations

import itertools
from typing import Any

import nncf
import numpy as np
import openvino as ov
from openvino import opset13

from deploytool.backends import tables
from deploytool.backends.base import Request
from deploytool.errors import BackendFailed, InputRefused

_MODES = {"int8": nncf.CompressWeightsMode.INT8_ASYM, "int4": nncf.CompressWeightsMode.INT4_ASYM}
_METHODS: dict[str, dict[str, bool]] = {
    "plain": {},
    "scale-estimation": {"scale_estimation": True},
    "awq": {"awq": True, "scale_estimation": True},
    "gptq": {"gptq": True},
}


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
    done: dict[str, Any] = {"weights_only": True, "weight_elements": bits}
    if precision == "int4":
        done |= {"method": options.method, "group_size": options.group_size, "int4_share": options.int4_share,
                 "calibration_feeds": settings["subset_size"], "turned_weights": turned}  # fmt: skip
    return compressed, done


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

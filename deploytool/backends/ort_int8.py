"""Dynamic int8 of an ONNX graph with ONNX Runtime's quantizer.

Weights get 7 bits per output channel by default: products of 8-bit weights saturate silently in the AVX2 kernels of
CPUs without VNNI. The products that cost most on the calibration feeds stay fp32 (onnx_products.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from deploytool.backends import tables
from deploytool.backends.base import Request
from deploytool.backends.onnx_products import products_to_keep, with_products
from deploytool.errors import InputRefused, UsageProblem, nearest

_INT8_OPS = ("MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "ConvInteger", "Gather")
_LARGEST_BYTES = 1_900_000_000  # a file of one piece must stay below 2 GB


def quantize(source: Path, request: Request, options: tables.OnnxRuntimeBuild, out: Path) -> dict[str, Any]:
    """Write the int8 graph to `out` and return what was done; raises InputRefused when nothing became int8."""
    model = with_products(onnx.load(source))
    add_pre_process_metadata(model)  # else the quantizer asks for a preparation that fails on transformers
    _check_names(model, options)
    bits = 7 if options.reduce_range else 8
    kept = [*options.exclude]
    if "MatMul" in options.int8_ops:
        kept += products_to_keep(model, request, options, bits)
    quantize_dynamic(
        model, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=options.reduce_range,
        op_types_to_quantize=list(options.int8_ops), nodes_to_exclude=kept,
        use_external_data_format=model.ByteSize() > _LARGEST_BYTES,
        # Operators of com.microsoft have no shape inference; without a default the quantizer stops at their weights.
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
    )  # fmt: skip
    done = _int8_nodes(onnx.load(out, load_external_data=False))
    if not done:
        there = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise InputRefused(
            "DT310", f"the graph must hold operators that become dynamic int8: {', '.join(options.int8_ops)} with "
            f"constant weights (got {there})",
            fix="choose an fp32 target, or one with static int8: openvino-int8",
        )  # fmt: skip
    return {"int8": done, "kept_fp32": kept, "weight_bits": bits}


def _check_names(model: ModelProto, options: tables.OnnxRuntimeBuild) -> None:
    names = [node.name for node in model.graph.node]
    unknown = [name for name in options.exclude if name not in names]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name nodes of the graph (got {', '.join(unknown)})",
                           detail=[nearest(name, names) for name in unknown[:5]])  # fmt: skip


def _int8_nodes(model: ModelProto) -> dict[str, int]:
    """How many nodes of each kind compute on int8 constants."""
    constants = {t.name for t in model.graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    return dict(Counter(n.op_type for n in model.graph.node
                        if n.op_type in _INT8_OPS and constants.intersection(n.input)))  # fmt: skip

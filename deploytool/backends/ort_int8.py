"""Dynamic int8 of an ONNX graph with ONNX Runtime's quantizer.

Weights get 7 bits per output channel by default: products of 8-bit weights saturate silently in the AVX2 kernels of
CPUs without VNNI. The products that lose most on the calibration feeds stay fp32.
"""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from deploytool.backends import tables
from deploytool.backends.base import Request
from deploytool.backends.sensitivity import dynamic_int8_loss, most_sensitive
from deploytool.errors import InputRefused, UsageProblem, nearest

_INT8_OPS = ("MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "ConvInteger")
_ROWS = 4096  # rows of one feed that a product's loss is measured on


def quantize(source: Path, request: Request, options: tables.OnnxRuntimeBuild, out: Path) -> dict[str, Any]:
    """Write the int8 graph to `out` and return what was done; raises InputRefused when nothing became int8."""
    model = _clean(onnx.load(source))
    names = [node.name for node in model.graph.node]
    unknown = [name for name in options.exclude if name not in names]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name nodes of the graph (got {', '.join(unknown)})",
                           detail=[nearest(name, names) for name in unknown[:5]])  # fmt: skip
    losses = _losses(model, request, options) if "MatMul" in options.op_types and options.keep_fp32 != 0 else {}
    kept = [*options.exclude, *most_sensitive(losses, options.keep_fp32)]
    before = Counter(node.op_type for node in model.graph.node)
    quantize_dynamic(
        model, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=options.reduce_range,
        op_types_to_quantize=list(options.op_types), nodes_to_exclude=kept,
        use_external_data_format=model.ByteSize() > 1_900_000_000,
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
    )  # fmt: skip
    after = Counter(node.op_type for node in onnx.load(out, load_external_data=False).graph.node)
    done = {name: after[name] - before[name] for name in _INT8_OPS if after[name] > before[name]}
    if not done:
        raise InputRefused(
            "DT310", f"the graph must hold operators that become dynamic int8: {', '.join(options.op_types)} with "
            f"constant weights (got {', '.join(sorted(before))})",
            fix="choose an fp32 target, or one with static int8: openvino-int8",
        )  # fmt: skip
    return {"int8": done, "kept_fp32": kept, "weight_bits": 7 if options.reduce_range else 8}


def _clean(model: ModelProto) -> ModelProto:
    """The graph without recorded shapes, which contradict the quantizer's own, and with a name for every node."""
    del model.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{index}"
    add_pre_process_metadata(model)
    return model


def _losses(model: ModelProto, request: Request, options: tables.OnnxRuntimeBuild) -> dict[str, float]:
    """Largest loss of every matrix product with constant weights over the calibration feeds, by node name."""
    weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    products = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm") and n.input[1] in weights]
    session = _session_with_outputs(model, {node.input[0] for node in products})
    matrices = {node.name: _matrix(node, weights[node.input[1]]) for node in products}
    losses = dict.fromkeys(matrices, 0.0)
    wanted = [output.name for output in session.get_outputs()]
    for feeds in itertools.islice(request.calibration(), options.samples):
        values = dict(zip(wanted, session.run(wanted, dict(feeds)), strict=True))
        for node in products:
            rows = values[node.input[0]].reshape(-1, matrices[node.name].shape[0])[:_ROWS]
            loss = dynamic_int8_loss(rows, matrices[node.name], 7 if options.reduce_range else 8)
            losses[node.name] = max(losses[node.name], loss)
    return losses


def _matrix(node: NodeProto, weight: TensorProto) -> np.ndarray:
    """The constant as [in, out]."""
    matrix = numpy_helper.to_array(weight)
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return np.ascontiguousarray(matrix.T) if transposed else matrix


def _session_with_outputs(model: ModelProto, names: set[str]) -> ort.InferenceSession:
    """A session that gives inner values too."""
    probe = ModelProto()
    probe.CopyFrom(model)
    given = {value.name for value in (*probe.graph.output, *probe.graph.input)}
    probe.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in sorted(names - given))
    return ort.InferenceSession(probe.SerializeToString(), providers=["CPUExecutionProvider"])

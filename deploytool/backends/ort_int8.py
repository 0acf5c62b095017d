"""Dynamic int8 of an ONNX graph with ONNX Runtime's quantizer.

Weights get 7 bits per output channel by default: products of 8-bit weights saturate silently in the AVX2 kernels of
CPUs without VNNI. The products that cost most on the calibration feeds stay fp32 (sensitivity.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.onnx_model import ONNXModel
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from deploytool.backends import sensitivity, tables
from deploytool.backends.base import Request
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.signature import Feeds

_INT8_OPS = ("MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "ConvInteger", "Gather")
_LARGEST_BYTES = 1_900_000_000  # a file of one piece must stay below 2 GB


def quantize(source: Path, request: Request, options: tables.OnnxRuntimeBuild, out: Path) -> dict[str, Any]:
    """Write the int8 graph to `out` and return what was done; raises InputRefused when nothing became int8."""
    model = _prepared(onnx.load(source))
    _check_names(model, options)
    bits = 7 if options.reduce_range else 8
    kept = [*options.exclude]
    if "MatMul" in options.op_types:
        kept += _Ranking(model, request, options, bits).kept()
    quantize_dynamic(
        model, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=options.reduce_range,
        op_types_to_quantize=list(options.op_types), nodes_to_exclude=kept,
        use_external_data_format=model.ByteSize() > _LARGEST_BYTES,
        # Operators of com.microsoft have no shape inference; without a default the quantizer stops at their weights.
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
    )  # fmt: skip
    done = _int8_nodes(onnx.load(out, load_external_data=False))
    if not done:
        there = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise InputRefused(
            "DT310", f"the graph must hold operators that become dynamic int8: {', '.join(options.op_types)} with "
            f"constant weights (got {there})",
            fix="choose an fp32 target, or one with static int8: openvino-int8",
        )  # fmt: skip
    return {"int8": done, "kept_fp32": kept, "weight_bits": bits}


def _prepared(model: ModelProto) -> ModelProto:
    """The graph as the quantizer wants it: no recorded shapes (they contradict its own), names, products as MatMul."""
    del model.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{index}"
    _unshare_gemm_weights(model)
    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
    add_pre_process_metadata(wrapped.model)
    result: ModelProto = wrapped.model
    return result


def _unshare_gemm_weights(model: ModelProto) -> None:
    """Give every Gemm a weight of its own: the quantizer transposes them in place, tied ones once per user."""
    users = Counter(name for node in model.graph.node for name in node.input)
    constants = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Gemm" and users[node.input[1]] > 1 and node.input[1] in constants:
            own = TensorProto()
            own.CopyFrom(constants[node.input[1]])
            own.name = f"{node.input[1]}_of_{node.name}"
            model.graph.initializer.append(own)
            node.input[1] = own.name


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


class _Ranking:
    """Measures products on a copy of the graph where noise can be added to each of them."""

    def __init__(self, model: ModelProto, request: Request, options: tables.OnnxRuntimeBuild, bits: int) -> None:
        weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
        products = [n for n in model.graph.node
                    if n.op_type == "MatMul" and n.input[1] in weights and n.name not in options.exclude]  # fmt: skip
        self.inputs = {n.name: n.input[0] for n in products}
        self.weights = {n.name: numpy_helper.to_array(weights[n.input[1]]) for n in products}
        self.request, self.options, self.bits = request, options, bits
        self.outputs = [o.name for o in model.graph.output]
        if self._needed:
            self.session = ort.InferenceSession(_with_noise_inputs(model, products).SerializeToString(),
                                                providers=["CPUExecutionProvider"])  # fmt: skip

    @property
    def _needed(self) -> bool:
        return sensitivity.worth_ranking(len(self.inputs), self.options.keep_fp32)

    def kept(self) -> list[str]:
        """Names of the products that stay fp32."""
        if not self._needed:
            return []
        errors = dict.fromkeys(self.inputs, 0.0)
        feeds_list = sensitivity.spread(self.request.calibration(), self.options.samples)
        for feeds in feeds_list:
            values = self._run(feeds, sorted(set(self.inputs.values())))
            for name, key in self.inputs.items():
                errors[name] = max(errors[name], sensitivity.own_error(values[key], self.weights[name], self.bits))
        effects = dict.fromkeys(sensitivity.candidates(errors, self.options.keep_fp32), 0.0)
        for feeds in feeds_list:
            values = self._run(feeds, [*self.outputs, *sorted({self.inputs[name] for name in effects})])
            reference = [values[name] for name in self.outputs]
            for name in effects:
                noise = sensitivity.int8_noise(values[self.inputs[name]], self.weights[name], self.bits)
                noisy = self._run(feeds, self.outputs, {f"{name}:noise": noise})
                effects[name] = max(effects[name], sensitivity.output_loss(reference, noisy.values()))
        return sensitivity.most_sensitive(effects, len(self.inputs), self.options.keep_fp32,
                                          self.request.target.parity.cosine_min)  # fmt: skip

    def _run(self, feeds: Feeds, wanted: list[str], noise: Feeds | None = None) -> dict[str, np.ndarray]:
        silent = {f"{name}:noise": np.zeros(1, np.float32) for name in self.inputs}
        given = {**silent, **(noise or {})}
        return dict(zip(wanted, self.session.run(wanted, {**feeds, **given}), strict=True))


def _with_noise_inputs(model: ModelProto, products: list[NodeProto]) -> ModelProto:
    """A copy where the noise `NAME:noise` is added to product NAME, and the products' inputs are outputs."""
    copy = ModelProto()
    copy.CopyFrom(model)
    chosen = {n.name for n in products}
    given = {value.name for value in (*copy.graph.output, *copy.graph.input)}
    nodes = []
    for node in copy.graph.node:
        nodes.append(node)
        if node.name in chosen:
            result = node.output[0]
            node.output[0] = f"{result}:exact"
            nodes.append(helper.make_node("Add", [node.output[0], f"{node.name}:noise"], [result]))
            copy.graph.input.append(helper.make_tensor_value_info(f"{node.name}:noise", TensorProto.FLOAT, None))
    wanted = {node.input[0] for node in products} - given
    copy.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(wanted))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy

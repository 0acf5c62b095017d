"""The matrix products of an ONNX graph, and which of them stay fp32 when the others become int8.

A copy of the graph runs in ONNX Runtime with a noise input at every product, so that the int8 error of one product
alone can be put in and its effect on the outputs seen: one session serves all products.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization.onnx_model import ONNXModel

from deploytool.backends import sensitivity, tables
from deploytool.backends.base import Request
from deploytool.signature import Feeds


def with_products(model: ModelProto) -> ModelProto:
    """The graph as quantizers want it: no recorded shapes (they contradict their own), names, products as MatMul."""
    del model.graph.value_info[:]
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{index}"
    _unshare_gemm_weights(model)
    wrapped = ONNXModel(model)
    wrapped.replace_gemm_with_matmul()
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


class Rounding(Protocol):
    """What int8 does to the products of a graph, each by itself; `x` is the product's input."""

    def error(self, name: str, x: np.ndarray) -> float:
        """The relative error of a product's result."""
        ...

    def noise(self, name: str, x: np.ndarray) -> np.ndarray:
        """What int8 adds to a product's result."""
        ...


def products_to_keep(
    model: ModelProto, request: Request, options: tables.KeepFp32, bits: int, whole: Collection[str] = ()
) -> list[str]:
    """Names of the MatMul nodes with constant weights that stay fp32.

    `bits` is the width of int8 weights, but of those named in `whole`, which have 8.
    """
    products = constant_products(model, options)
    effects = effects_of(model, products, dynamic_rounding(model, products, bits, whole), request, options)
    return sensitivity.most_sensitive(effects, len(products), options.keep_fp32, request.target.parity.cosine_min)


def constant_products(model: ModelProto, options: tables.KeepFp32) -> list[NodeProto]:
    """The MatMul nodes with constant weights that may become int8."""
    weights = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    return [n for n in model.graph.node
            if n.op_type == "MatMul" and n.input[1] in weights and n.name not in options.exclude]  # fmt: skip


def dynamic_rounding(
    model: ModelProto, products: Sequence[NodeProto], bits: int, whole: Collection[str] = ()
) -> Rounding:
    """Dynamic int8 of these products; `bits` and `whole` as in products_to_keep."""
    weights = {t.name: t for t in model.graph.initializer}
    return _Dynamic({n.name: numpy_helper.to_array(weights[n.input[1]]) for n in products},
                    {n.name: 8 if n.input[1] in whole else bits for n in products})  # fmt: skip


def effects_of(
    model: ModelProto, products: Sequence[NodeProto], rounding: Rounding, request: Request, options: tables.KeepFp32
) -> dict[str, float]:
    """What rounding the most erring products costs the outputs, each alone, by name; empty where nothing is ranked."""
    if not sensitivity.worth_ranking(len(products), options.keep_fp32):
        return {}
    return _Ranking(model, products, rounding, request, options).effects()


def all_effects(
    model: ModelProto, products: Sequence[NodeProto], rounding: Rounding, request: Request, options: tables.KeepFp32
) -> dict[str, float]:
    """What rounding each of the products alone costs the outputs, by name."""
    return _Ranking(model, products, rounding, request, options).effects(everyone=True) if products else {}


@dataclass(frozen=True)
class _Dynamic:
    """Dynamic int8: weights symmetric per channel, one range per call for the activations."""

    weights: Mapping[str, np.ndarray]
    bits: Mapping[str, int]

    def error(self, name: str, x: np.ndarray) -> float:
        return sensitivity.own_error(x, self.weights[name], self.bits[name])

    def noise(self, name: str, x: np.ndarray) -> np.ndarray:
        return sensitivity.int8_noise(x, self.weights[name], self.bits[name])


class _Ranking:
    """Measures products on a copy of the graph where noise can be added to each of them."""

    def __init__(
        self, model: ModelProto, products: Sequence[NodeProto], rounding: Rounding, request: Request,
        options: tables.KeepFp32,
    ) -> None:  # fmt: skip
        self.inputs = {n.name: n.input[0] for n in products}
        self.rounding, self.request, self.options = rounding, request, options
        self.outputs = [o.name for o in model.graph.output]
        self.session = ort.InferenceSession(_with_noise_inputs(model, products).SerializeToString(),
                                            providers=["CPUExecutionProvider"])  # fmt: skip

    def effects(self, *, everyone: bool = False) -> dict[str, float]:
        """Loss of the outputs' cosine by each candidate's noise; of `everyone`, where that is wanted."""
        feeds_list = sensitivity.spread(self.request.calibration(), self.options.samples)
        effects = dict.fromkeys(self.inputs if everyone else self._candidates(feeds_list), 0.0)
        for feeds in feeds_list:
            values = self._run(feeds, [*self.outputs, *sorted({self.inputs[name] for name in effects})])
            reference = [values[name] for name in self.outputs]
            for name in effects:
                noise = self.rounding.noise(name, values[self.inputs[name]])
                noisy = self._run(feeds, self.outputs, {f"{name}:noise": noise})
                outputs = [noisy[key] for key in self.outputs]
                effects[name] = max(effects[name], sensitivity.output_loss(reference, outputs))
        return effects

    def _candidates(self, feeds_list: Sequence[Feeds]) -> list[str]:
        """The products with the largest own errors."""
        errors = dict.fromkeys(self.inputs, 0.0)
        for feeds in feeds_list:
            values = self._run(feeds, sorted(set(self.inputs.values())))
            for name, key in self.inputs.items():
                errors[name] = max(errors[name], self.rounding.error(name, values[key]))
        return sensitivity.candidates(errors, self.options.keep_fp32)

    def _run(self, feeds: Feeds, wanted: list[str], noise: Feeds | None = None) -> dict[str, np.ndarray]:
        silent = {f"{name}:noise": np.zeros(1, np.float32) for name in self.inputs}
        given = {**silent, **(noise or {})}
        made = [name for name in wanted if name not in feeds]
        return {**feeds, **dict(zip(made, self.session.run(made, {**feeds, **given}), strict=True))}


def _with_noise_inputs(model: ModelProto, products: Sequence[NodeProto]) -> ModelProto:
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

"""Writes static int8 into an ONNX graph: pairs of QuantizeLinear and DequantizeLinear at chosen products.

Only what a chosen node reads is rounded: a residual sum beside a product keeps its floats. Engines fuse the pairs into
int8 kernels. Weights are symmetric per output channel; activations have one range per tensor. Other grids than int8 are
in onnx_schemes.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.backends.onnx_ranges import METHODS, Range
from deploytool.backends.saturation import pair_sums

_ACTIVATIONS = ("Relu", "Clip")  # merged into a convolution that is rounded after them
_LEAST_SCALE = 2.0**-24  # of fp16, and far below any other scale
_LARGEST_BIAS = 2.0**30  # in steps: a bias is an int32 in the grid of the product

Codes = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Scheme:
    """How numbers are rounded.

    weight_bits   7: where 8 could saturate in kernels that add two products in 16 bits (saturation.py), else 8
    symmetric     activations as int8 with zero point 0, else as uint8 with a zero point
    scales        element type that the scales will have: codes are found with what is left of a scale in it

    name             of the type
    opset            the first operator set that has it, which the graph must be of
    rounds_inputs    whether activations are rounded too
    rounds_results   whether what a convolution gives is rounded, so that the next layer reads codes
    calibrations     what `calibration = "auto"` chooses from
    """

    weight_bits: int
    symmetric: bool = False
    scales: int = TensorProto.FLOAT
    name: ClassVar[str] = "int8"
    opset: ClassVar[int] = 13
    rounds_inputs: ClassVar[bool] = True
    rounds_results: ClassVar[bool] = True
    calibrations: ClassVar[tuple[str, ...]] = METHODS

    def step(self, low: float, high: float) -> tuple[np.float32, np.integer]:
        """Scale and zero point of an activation with this range."""
        low, high = min(low, 0.0), max(high, 0.0)
        if self.symmetric:
            return np.float32(self.held(np.float32(max(-low, high) / 127 or 1.0))), np.int8(0)
        step = (high - low) / 255 or 1.0
        return np.float32(step), np.uint8(np.clip(np.round(-low / step), 0, 255))

    def rounded(self, x: np.ndarray, low: float, high: float) -> np.ndarray:
        """Activations on their grid, cut off at the ends of the range."""
        step, zero = self.step(low, high)
        ends = np.iinfo(zero.dtype)
        grid: np.ndarray = (np.clip(np.round(x / step) + float(zero), ends.min, ends.max) - float(zero)) * step
        return grid.astype(np.float32, copy=False)

    def held(self, scale: np.ndarray | np.float32) -> np.ndarray:
        """Scales, float32, as they are when they are stored."""
        if self.scales == TensorProto.FLOAT:
            return np.asarray(scale)
        kept = np.asarray(scale).astype(helper.tensor_dtype_to_np_dtype(self.scales)).astype(np.float32)
        return np.where(kept > 0, kept, np.float32(_LEAST_SCALE))

    def codes(self, weight: np.ndarray, axis: int, least: np.ndarray | None = None, node: str = "") -> Codes:
        """Codes of the weight of `node` and the scale of each channel along `axis`, no scale below `least`."""
        codes, scale = self._rounded(weight, axis, least, 8)
        if self.weight_bits == 8 or not pair_sums(codes, axis).can_saturate:
            return codes, scale
        return self._rounded(weight, axis, least, self.weight_bits)

    def _rounded(self, weight: np.ndarray, axis: int, least: np.ndarray | None, bits: int) -> Codes:
        """Symmetric codes of this width and the scale of each channel, see `codes`."""
        limit = 2 ** (bits - 1) - 1
        others = tuple(index for index in range(weight.ndim) if index != axis)
        scale = np.maximum(np.abs(weight).max(axis=others) / limit, 0.0 if least is None else least)
        scale = self.held(np.where(scale == 0, 1.0, scale).astype(np.float32))
        shape = [-1 if index == axis else 1 for index in range(weight.ndim)]
        return np.clip(np.round(weight / scale.reshape(shape)), -limit, limit).astype(np.int8), scale


def values(codes: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """What codes stand for, float32; scales are of channels along `axis`, or [blocks, outputs] of [inputs, outputs]."""
    if scale.ndim > 1:
        return np.asarray(codes.astype(np.float32) * np.repeat(scale, len(codes) // len(scale), axis=0))
    spread = scale.reshape([-1 if index == axis else 1 for index in range(codes.ndim)])
    return np.asarray(codes.astype(np.float32) * spread)


def channel_axis(node: NodeProto, weight: np.ndarray) -> int:
    """The axis of a product's weight that counts its outputs."""
    return 0 if node.op_type == "Conv" else weight.ndim - 1


def quantizable(model: ModelProto, op_types: Sequence[str]) -> list[NodeProto]:
    """The convolutions and matrix products with a constant float weight."""
    ranks = {t.name: len(t.dims) for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    return [n for n in model.graph.node if n.op_type in op_types
            and (ranks.get(n.input[1]) == 2 if n.op_type == "MatMul" else ranks.get(n.input[1], 0) > 2)]  # fmt: skip


def ranges_needed(model: ModelProto, nodes: Sequence[NodeProto], scheme: Scheme) -> set[str]:
    """Names of the tensors whose range must be known to quantize these nodes."""
    users = _users(model)
    results = {_end(node, users) for node in nodes if node.op_type == "Conv" and scheme.rounds_results}
    return {node.input[0] for node in nodes if scheme.rounds_inputs} | results


def write_qdq(model: ModelProto, nodes: Sequence[NodeProto], ranges: Mapping[str, Range], scheme: Scheme) -> ModelProto:
    """A copy of the graph in which these nodes read and (convolutions of int8) give codes."""
    result = ModelProto()
    result.CopyFrom(model)
    work = _Writer(result, {node.name for node in nodes}, ranges, scheme)
    del result.graph.node[:]
    result.graph.node.extend(work.written(model))
    _drop_unused(result)
    return result


class _Writer:
    def __init__(self, result: ModelProto, chosen: set[str], ranges: Mapping[str, Range], scheme: Scheme) -> None:
        self.graph, self.chosen, self.ranges, self.scheme = result.graph, chosen, ranges, scheme
        self.given = {t.name: numpy_helper.to_array(t) for t in result.graph.initializer}
        self.pairs: dict[str, str] = {}  # tensor -> what gives it rounded
        self.nodes: list[NodeProto] = []

    def written(self, model: ModelProto) -> list[NodeProto]:
        users = _users(model)
        ends = {_end(n, users) for n in model.graph.node
                if n.name in self.chosen and n.op_type == "Conv" and self.scheme.rounds_results}  # fmt: skip
        final = {value.name for value in model.graph.output}
        for node in model.graph.node:
            copy = NodeProto()
            copy.CopyFrom(node)
            for index, name in enumerate(node.input):
                if name in ends and name not in final:  # a convolution gives int8 only where nobody reads its floats
                    copy.input[index] = self._pair(name)
            self.nodes.append(self._product(node, copy) if node.name in self.chosen else copy)
            for name in node.output:
                if name in ends and name in final:
                    self.nodes[-1].output[list(node.output).index(name)] = f"{name}:exact"
                    self._pair(name, f"{name}:exact", name)
        return self.nodes

    def _product(self, node: NodeProto, copy: NodeProto) -> NodeProto:
        weight = self.given[node.input[1]]
        axis = channel_axis(node, weight)
        if not self.scheme.rounds_inputs:
            codes, scale = self.scheme.codes(weight, axis, node=node.name)
            copy.input[1] = self._dequantized(f"{node.name}:weight", codes, scale, None, 0, len(codes) // len(scale))
            return copy
        copy.input[0] = self._pair(node.input[0])
        # TensorRT takes a bias in float, ONNX Runtime's int8 convolution takes it as int32.
        biased = not self.scheme.symmetric and len(node.input) > 2 and node.input[2] in self.given
        step = self.scheme.step(*self.ranges[node.input[0]])[0]
        bias = self.given[node.input[2]] if biased else None
        least = None if bias is None else np.abs(bias) / (step * _LARGEST_BIAS)
        codes, scale = self.scheme.codes(weight, axis, least, node.name)
        prefix = f"{node.name}:weight"
        copy.input[1] = self._dequantized(prefix, codes, scale, np.zeros(len(scale), codes.dtype), axis)
        if bias is not None:
            grid = scale * step
            whole = np.round(bias / grid).astype(np.int32)
            copy.input[2] = self._dequantized(f"{node.name}:bias", whole, grid, np.zeros(len(grid), np.int32), 0)
        return copy

    def _pair(self, name: str, source: str = "", result: str = "") -> str:
        """The name of a tensor's rounded form, made when first asked for."""
        if name not in self.pairs:
            step, zero = self.scheme.step(*self.ranges[name])
            grid = [self._constant(f"{name}:scale", np.asarray(step)), self._constant(f"{name}:zero", np.asarray(zero))]
            self.pairs[name] = result or f"{name}:rounded"
            self.nodes += [
                helper.make_node("QuantizeLinear", [source or name, *grid], [f"{name}:codes"], name=f"{name}:Quantize"),
                helper.make_node("DequantizeLinear", [f"{name}:codes", *grid], [self.pairs[name]],
                                 name=f"{name}:Dequantize"),
            ]  # fmt: skip
        return self.pairs[name]

    def _dequantized(
        self, prefix: str, codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, axis: int, block: int = 0
    ) -> str:
        given = {"codes": codes, "scale": scale} | ({} if zero is None else {"zero": zero})
        parts = [self._constant(f"{prefix}:{end}", array) for end, array in given.items()]
        node = helper.make_node("DequantizeLinear", parts, [f"{prefix}:rounded"], axis=axis,
                                name=f"{prefix}:Dequantize")  # fmt: skip
        if block:
            node.attribute.append(helper.make_attribute("block_size", block))
        self.nodes.append(node)
        return f"{prefix}:rounded"

    def _constant(self, name: str, array: np.ndarray) -> str:
        self.graph.initializer.append(numpy_helper.from_array(array, name))
        return name


def _users(model: ModelProto) -> dict[str, list[NodeProto]]:
    users: dict[str, list[NodeProto]] = {value.name: [NodeProto()] for value in model.graph.output}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    return users


def _end(node: NodeProto, users: Mapping[str, Sequence[NodeProto]]) -> str:
    """The result of a convolution, after the activation that alone reads it."""
    after = users.get(node.output[0], [])
    return str((after[0] if len(after) == 1 and after[0].op_type in _ACTIVATIONS else node).output[0])


def _drop_unused(model: ModelProto) -> None:
    """Float weights that no node reads any more."""
    used = Counter(name for node in model.graph.node for name in node.input)
    used.update(value.name for value in model.graph.output)
    kept = [t for t in model.graph.initializer if used[t.name] or _bodies(model)]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def _bodies(model: ModelProto) -> bool:
    """Whether a node has a body of its own, which may read any tensor around it by name."""
    return any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute)

"""Static int8 (or fp8, or int4 of the weights) of an ONNX graph: ranges by calibration, and the products that cost
most left in fp32.

The unfused portable graph is quantized: engines fuse it afterwards, and the quantizers' trouble with operators that are
not of ONNX's own ("Unable to find data type for weight_name") does not arise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.backends import ort_mixed, saturation, sensitivity, tables
from deploytool.backends.base import Request
from deploytool.backends.onnx_opset import raise_opset
from deploytool.backends.onnx_products import all_effects, effects_of, with_products
from deploytool.backends.onnx_qdq import Scheme, channel_axis, quantizable, ranges_needed, values, write_qdq
from deploytool.backends.onnx_ranges import Activations, Range
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.signature import Feeds

_LARGEST_BYTES = 1_900_000_000  # a file of one piece must stay below 2 GB
_OLDEST_OPSET = 13  # the first in which a weight may have a scale per channel
_GOOD_ENOUGH_SHARE = 0.5  # of the profile's allowed loss of cosine
# ONNX Runtime 1.31 takes a Relu before a fp8 QuantizeLinear for one that the rounding does, and drops it.
WITHOUT = ("ReluQuantRewrite",)
# It makes a product and its sum a Gemm again before the pairs around the product are looked at: computed in floats.
APART = ("MatMulAddFusion",)
_AT_ONCE = 2  # products that are kept in addition while the loss is too large


@dataclass(frozen=True)
class Options:
    """What `[build]` says of static int8, whatever the backend."""

    keep: tables.KeepFp32
    op_types: tuple[str, ...]
    calibration: str
    samples: int
    scheme: Scheme
    weighs: Mapping[str, Any] | None = None  # what the artifact is opened with, where gains are measured


def quantize_static(source: Path, request: Request, options: Options, out: Path) -> dict[str, Any]:
    """Write the graph with its Q/DQ pairs to `out` and return what was done.

    Raises InputRefused DT310 when there is nothing to quantize, DT303 without calibration feeds.
    """
    model = onnx.load(source)
    _check_opset(model)
    model = with_products(raise_opset(model, options.scheme.opset))
    _check_names(model, options)
    nodes = [n for n in quantizable(model, options.op_types) if n.name not in options.keep.exclude]
    if not nodes:
        there = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise InputRefused(
            "DT310", f"the graph must hold {' or '.join(options.op_types)} with constant weights (got {there})",
            fix="choose an fp32 target, or openvino-int8, which quantizes other operators too",
        )  # fmt: skip
    feeds = sensitivity.spread(request.calibration(), options.samples)
    if not feeds:
        raise InputRefused("DT303", "calibration must have at least one sample (got none)")
    scheme = options.scheme
    search = _Search(model, nodes, feeds, request, options)
    table = None if options.weighs is None else search.weighed(options.weighs)
    best, kept, method, loss = search.best() if table is None else search.without(ort_mixed.kept(table))
    _save(best, out)
    done = Counter(node.op_type for node in nodes if node.name not in kept)
    if not done and table:
        raise ort_mixed.nothing_left(table)
    if not done:
        raise InputRefused("DT310", f"at least one product must become {scheme.name} (all are kept in fp32)",
                           fix="lower keep_fp32, or choose an fp32 target")  # fmt: skip
    return {"scheme": "static" if scheme.rounds_inputs else "weights",
            "calibration": method if scheme.rounds_inputs else None, "calibration_feeds": len(feeds),
            scheme.name: dict(done), "kept_fp32": [*options.keep.exclude, *kept], "weight_bits": scheme.weight_bits,
            "calibration_loss": loss, **_widths(best, nodes, scheme), **({"measured": table} if table else {})}


def _widths(graph: ModelProto, nodes: Sequence[NodeProto], scheme: Scheme) -> dict[str, Any]:
    """Which weights have 8 bits although 7 were asked for, and how many can saturate; nothing of GPUs."""
    if scheme.symmetric:
        return {}
    tensors = {t.name: t for t in graph.graph.initializer}
    codes = {n.name: (n, numpy_helper.to_array(tensors[name])) for n in nodes
             if (name := f"{n.name}:weight:codes") in tensors}  # fmt: skip
    limit = 2 ** (scheme.weight_bits - 1) - 1
    return {"weights_in_8_bits": sorted(name for name, (_, array) in codes.items() if abs(array).max() > limit),
            "can_saturate": saturation.counted((name, array, channel_axis(node, array))
                                               for name, (node, array) in codes.items())}  # fmt: skip


class _Search:
    """Tries calibrations, then more products in fp32, until the loss on the feeds is half of what is allowed."""

    def __init__(
        self, model: ModelProto, nodes: Sequence[NodeProto], feeds: Sequence[Feeds], request: Request, options: Options
    ) -> None:
        self.model, self.nodes, self.feeds, self.request, self.options = model, nodes, feeds, request, options
        self.activations = Activations(model, sorted(ranges_needed(model, nodes, options.scheme)), feeds)
        self.outputs = [value.name for value in model.graph.output]
        self.reference = self._run(model)

    def best(self) -> tuple[ModelProto, list[str], str, float]:
        """The graph, names of the products in fp32, the calibration, and the loss of cosine on the feeds."""
        keep = self.options.keep.keep_fp32
        cosine_min = self.request.target.parity.cosine_min
        effects = self._effects()
        kept = sensitivity.most_sensitive(effects, len(self.nodes), keep, cosine_min)
        wanted = _GOOD_ENOUGH_SHARE * (1.0 - cosine_min)
        graph, kept, method, loss = self.without(kept)
        ranked = sorted(effects, key=lambda name: (-effects[name], name))
        while keep is None and loss > wanted and len(kept) < len(ranked):
            more = ranked[: len(kept) + _AT_ONCE]
            other, less = self._quantized(self.activations.ranges(method), more)
            kept = more
            if less < loss:
                graph, loss = other, less
        return graph, _left_out(graph, kept), method, loss

    def without(self, kept: Sequence[str]) -> tuple[ModelProto, list[str], str, float]:
        """As `best`, with these products in fp32."""
        asked = self.options.calibration
        methods = self.options.scheme.calibrations if asked == "auto" else (asked,)
        tried = {method: self._quantized(self.activations.ranges(method), kept) for method in methods}
        method = min(tried, key=lambda name: tried[name][1])
        graph, loss = tried[method]
        return graph, list(kept), method, loss

    def weighed(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """What every product gains and costs; see `ort_mixed.weighed`."""
        keep = self.options.keep

        def rounded() -> ModelProto:
            return write_qdq(self.model, self.nodes, self.activations.ranges("min-max"), self.options.scheme)

        def loss(kept: Sequence[str]) -> float:
            return self.without(kept)[3]

        def effects(names: Sequence[str]) -> Mapping[str, float]:
            chosen = [node for node in self.nodes if node.name in names]
            return all_effects(self.model, chosen, self._rounding(), self.request, keep)

        return ort_mixed.weighed(self.request, ort_mixed.Choice(
            self.model, self.nodes, rounded, effects, loss, sensitivity.spread(self.feeds, keep.samples), settings))

    def _effects(self) -> dict[str, float]:
        return effects_of(self.model, self.nodes, self._rounding(), self.request, self.options.keep)

    def _rounding(self) -> _Static:
        return _Static(self.model, self.nodes, self.activations.ranges("min-max"), self.options.scheme)

    def _quantized(self, ranges: Mapping[str, Range], kept: Sequence[str]) -> tuple[ModelProto, float]:
        chosen = [node for node in self.nodes if node.name not in kept]
        graph = write_qdq(self.model, chosen, ranges, self.options.scheme)
        return graph, max(map(sensitivity.sample_loss, self.reference, self._run(graph)))

    def _run(self, model: ModelProto) -> list[list[np.ndarray]]:
        """The outputs on the feeds, in the engine itself: saturation and rounding are part of the answer.

        What is around zero is for GPUs: ONNX Runtime's own kernels for it would saturate where those do not.
        """
        session = _session(model, fused=not self.options.scheme.symmetric)
        return [session.run(self.outputs, dict(one)) for one in self.feeds]


def _left_out(graph: ModelProto, kept: Sequence[str]) -> list[str]:
    """Those of `kept` that are really fp32 in the graph that was taken."""
    rounded = {node.name for node in graph.graph.node if len(node.input) > 1 and node.input[1].endswith(":rounded")}
    return [name for name in kept if name not in rounded]


class _Static:
    """The rounding of one product alone; see onnx_products.Rounding."""

    def __init__(
        self, model: ModelProto, nodes: Sequence[NodeProto], ranges: Mapping[str, Range], scheme: Scheme
    ) -> None:
        self.nodes = {node.name: node for node in nodes}
        self.weights = {t.name: t for t in model.graph.initializer}
        self.opsets, self.version = list(model.opset_import), model.ir_version
        self.ranges, self.scheme = ranges, scheme
        self.product = cache(self._product)

    def error(self, name: str, x: np.ndarray) -> float:
        exact, rounded = self._both(name, x[: sensitivity.ROWS])
        return float(np.linalg.norm(rounded - exact) / max(float(np.linalg.norm(exact)), 1e-12))

    def noise(self, name: str, x: np.ndarray) -> np.ndarray:
        exact, rounded = self._both(name, x)
        noise: np.ndarray = rounded - exact
        return noise

    def _both(self, name: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        node = self.nodes[name]
        weight = numpy_helper.to_array(self.weights[node.input[1]])
        axis = channel_axis(node, weight)
        near = values(*self.scheme.codes(weight, axis, node=name), axis)
        run = self.product(name)
        rounded = self.scheme.rounded(x, *self.ranges[node.input[0]]) if self.scheme.rounds_inputs else x
        return run.run(None, {"x": x, "w": weight})[0], run.run(None, {"x": rounded, "w": near})[0]

    def _product(self, name: str) -> ort.InferenceSession:
        """A session of this node alone, without its bias: the bias is the same in both."""
        node = NodeProto()
        node.CopyFrom(self.nodes[name])
        del node.input[:]
        node.input.extend(["x", "w"])
        given = [helper.make_tensor_value_info(i, TensorProto.FLOAT, None) for i in ("x", "w")]
        result = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
        graph = helper.make_graph([node], "product", given, [result])
        return _session(helper.make_model(graph, opset_imports=self.opsets, ir_version=self.version))


def _session(model: ModelProto, *, fused: bool = True) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", str(int(not fused)))
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"],
                                disabled_optimizers=list(APART if fused else WITHOUT))  # fmt: skip


def _check_names(model: ModelProto, options: Options) -> None:
    names = [node.name for node in model.graph.node]
    unknown = [name for name in options.keep.exclude if name not in names]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name nodes of the graph (got {', '.join(unknown)})",
                           detail=[nearest(name, names) for name in unknown[:5]])  # fmt: skip


def _check_opset(model: ModelProto) -> None:
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if opset < _OLDEST_OPSET:
        raise InputRefused("DT310", f"static int8 must have a graph of opset {_OLDEST_OPSET} or later (got {opset})",
                           fix="export the ONNX file again with a later opset, or choose openvino-int8")  # fmt: skip


def _save(model: ModelProto, out: Path) -> None:
    onnx.save(model, out, save_as_external_data=model.ByteSize() > _LARGEST_BYTES, location=f"{out.name}.data")

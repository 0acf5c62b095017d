"""The portable graph in half precision, for engines that take their precision from the graph.

Half precision ends at 65,504 and loses digits below 6e-5. Four things would break it: values beyond the end (their
nodes stay fp32), mask constants such as -3.4e38 (clipped to -65,504, which a softmax cannot tell apart), the small
constants of norms (their nodes stay fp32), and sums of many squares (norms and reductions stay fp32; compilers fuse
the casts around them).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.onnx_half import LARGEST, SMALLEST, to_half
from deploytool.backends.onnx_rounded import in_floats
from deploytool.errors import InputRefused
from deploytool.signature import Feeds

_ACCUMULATING = ("CumSum", "InstanceNormalization", "LayerNormalization", "Pow", "ReduceL2", "ReduceMean", "ReduceSum",
                 "ReduceSumSquare", "Sqrt")  # fmt: skip
_FLOAT_ONLY = ("NonMaxSuppression", "Range", "TopK")
FP32_OPS = (*_ACCUMULATING, *_FLOAT_ONLY)
_HEADROOM = 2.0  # other inputs than the calibration feeds reach further
_MASK = 1e30  # beyond this a value stands for infinity


def write_fp16(source: Path, feeds: Sequence[Feeds], fp32_ops: Sequence[str], out: Path) -> dict[str, object]:
    """Write the fp16 graph to `out`; inputs and outputs keep their types. Returns what stayed fp32 and why.

    Raises InputRefused when the fp16 graph gives NaN or infinity where the fp32 graph does not.
    """
    model = _named(source)
    by_kind = kept_by_kind(model, fp32_ops)
    by_constant = _with_small_constants(model)
    by_value = _beyond_range(model, feeds)
    kept = {*by_kind, *by_constant, *by_value}
    half = to_half(model, kept | _grids_of(model, kept))
    onnx.save(half, out)
    _check_finite(model, out, feeds)
    return {"fp32_nodes": {"by_kind": len(by_kind), "small_constants": len(by_constant), "out_of_range": by_value}}


def write_bf16(source: Path, fp32_ops: Sequence[str], out: Path) -> dict[str, object]:
    """Write the bf16 graph to `out`, as `write_fp16`: its range is that of fp32, so only kinds of nodes stay so."""
    model = _named(source)
    by_kind = kept_by_kind(model, fp32_ops)
    onnx.save(to_half(model, {*by_kind, *_grids_of(model, set(by_kind))}, TensorProto.BFLOAT16), out)
    return {"fp32_nodes": {"by_kind": len(by_kind)}}


def _named(source: Path) -> ModelProto:
    model = onnx.load(source)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{index}"
    return model


def kept_by_kind(model: ModelProto, fp32_ops: Sequence[str]) -> list[str]:
    """Names of the nodes that stay fp32 for what they are."""
    return [node.name for node in model.graph.node if node.op_type in (*FP32_OPS, *fp32_ops)]


def _grids_of(model: ModelProto, kept: set[str]) -> set[str]:
    """The DequantizeLinear nodes that only nodes in fp32 read: a Cast between would keep an engine from int8."""
    users: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    grids = [node for node in model.graph.node if node.op_type == "DequantizeLinear"]
    return {grid.name for grid in grids
            if (read := users.get(grid.output[0])) and all(node.name in kept for node in read)}  # fmt: skip


def refuse_grids(portable: Artifact, engine: str) -> None:
    """Raise InputRefused DT310 for a model that was trained on grids of inputs: half precision moves them."""
    if "input_grids" in portable.settings:
        raise InputRefused("DT310", f"fp16 for {engine} must have a model without learned grids of inputs "
                           f"(got {portable.settings['input_grids']})",
                           fix='give the profile precision = "int8", as they were trained for')  # fmt: skip


def _with_small_constants(model: ModelProto) -> list[str]:
    """Nodes with a single number among their inputs that half precision would round away."""
    small = set()
    for name, tensor in _single_numbers(model):
        number = abs(float(numpy_helper.to_array(tensor).reshape(-1)[0]))
        if 0 < number < SMALLEST:
            small.add(name)
    return [node.name for node in model.graph.node if small.intersection(node.input)]


def _single_numbers(model: ModelProto) -> list[tuple[str, TensorProto]]:
    found = [(t.name, t) for t in model.graph.initializer]
    found += [(n.output[0], a.t) for n in model.graph.node if n.op_type == "Constant" for a in n.attribute
              if a.name == "value"]  # fmt: skip
    return [(name, t) for name, t in found if t.data_type == TensorProto.FLOAT and np.prod(t.dims) == 1]


def _beyond_range(model: ModelProto, feeds: Sequence[Feeds]) -> list[str]:
    """Names of nodes that take or give values that fp16 cannot hold, on the feeds."""
    probe = ModelProto()
    probe.CopyFrom(model)
    known = {value.name for value in probe.graph.output}
    codes = {node.output[0] for node in probe.graph.node if node.op_type == "QuantizeLinear"}
    inner = {name for node in probe.graph.node for name in node.output if name} - known - codes
    probe.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in sorted(inner))
    session = _session(probe.SerializeToString())
    names = [output.name for output in session.get_outputs()]
    wide: set[str] = set()
    for one in feeds:
        values = zip(names, session.run(names, dict(one)), strict=True)
        wide |= {name for name, value in values if name not in wide and _is_wide(value)}
    return [n.name for n in model.graph.node if n.op_type != "Constant" and wide.intersection((*n.input, *n.output))]


def _is_wide(value: object) -> bool:
    if not isinstance(value, np.ndarray) or value.dtype != np.float32:
        return False
    sizes = np.abs(value)
    return bool(np.any((sizes > LARGEST / _HEADROOM) & (sizes < _MASK)))


def _check_finite(model: ModelProto, out: Path, feeds: Sequence[Feeds]) -> None:
    exact, half = _session(model.SerializeToString()), rounding_session(out)
    for one in feeds:
        for spec, a, b in zip(exact.get_outputs(), exact.run(None, dict(one)), half.run(None, dict(one)), strict=True):
            if np.isfinite(a).all() and not np.isfinite(b).all():
                raise InputRefused(
                    "DT310", f"output {spec.name!r} must stay finite in fp16 (got NaN or infinity)",
                    fix="name the operators that overflow in [build] fp32_ops, or set precision = \"fp32\"",
                )  # fmt: skip


def rounding_session(path: Path, threads: int = 0) -> ort.InferenceSession:
    """A session that rounds every fp16 value, as a GPU does: see onnx_rounded.py."""
    return _session(in_floats(onnx.load(path)).SerializeToString(), threads)


def _session(model: bytes, threads: int = 0) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

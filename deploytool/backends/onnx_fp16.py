"""The portable graph in half precision, for engines that take their precision from the graph.

Half precision ends at 65,504 and loses digits below 6e-5. Four things would break it: values beyond the end (their
nodes stay fp32), mask constants such as -3.4e38 (clipped to -65,504, which a softmax cannot tell apart), the small
constants of norms (their nodes stay fp32), and sums of many squares (norms and reductions stay fp32; compilers fuse
the casts around them).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, helper, numpy_helper

from deploytool.artifact import Artifact
from deploytool.backends.onnx_half import LARGEST, SMALLEST, to_half
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
    model = onnx.load(source)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{index}"
    by_kind = [node.name for node in model.graph.node if node.op_type in (*FP32_OPS, *fp32_ops)]
    by_constant = _with_small_constants(model)
    by_value = _beyond_range(model, feeds)
    half = to_half(model, {*by_kind, *by_constant, *by_value})
    onnx.save(half, out)
    _check_finite(model, out, feeds)
    return {"fp32_nodes": {"by_kind": len(by_kind), "small_constants": len(by_constant), "out_of_range": by_value}}


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
    inner = {name for node in probe.graph.node for name in node.output if name} - known
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
    """A session that rounds every fp16 value, as a GPU does.

    On CPUs ONNX Runtime computes most fp16 operators in float and leaves the rounding out where two of them meet: its
    outputs would look better than any GPU's. Two Identities after every fp16 value (one alone is run in float too),
    kept by switching optimization off, bring the rounding back.
    """
    return _session(with_roundings(onnx.load(path)).SerializeToString(), threads)


def with_roundings(model: ModelProto) -> ModelProto:
    """A copy in which every fp16 value is really rounded; see rounding_session."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    halves = {v.name for v in inferred.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT16}
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    for node in model.graph.node:
        copy = result.graph.node.add()
        copy.CopyFrom(node)
        for index, name in enumerate(node.output):
            if name in halves:
                steps = (f"{name}:unrounded", f"{name}:rounded", name)
                copy.output[index] = steps[0]
                result.graph.node.extend(
                    helper.make_node("Identity", [a], [b], name=f"{b}:identity") for a, b in itertools.pairwise(steps)
                )
    return result


def _session(model: bytes, threads: int = 0) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

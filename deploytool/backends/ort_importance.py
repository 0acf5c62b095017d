"""How large the inputs of products are on real data: errors of weights count by what they are multiplied with."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from deploytool.backends import sensitivity
from deploytool.backends.base import Request
from deploytool.backends.onnx_edit import sizes
from deploytool.backends.ort_rows import run_rows
from deploytool.backends.ort_weights import products

_SMALL = 1024  # bytes: smaller constants stay in the graph, since shapes are read from them


def mean_squares(model: ir.Model, request: Request) -> dict[str, np.ndarray]:
    """Mean square of every input of every product, float64 [inputs], by the name of its weight.

    The mean is over all tokens of the calibration feeds.
    """
    graph = model.graph
    sources = {p.name: p.node.inputs[0] for p in products(graph)}
    values = {str(v.name): v for v in sources.values() if v is not None}
    added = [v for v in values.values() if not v.is_graph_output() and not v.is_graph_input()]
    known = len(graph.outputs)
    graph.outputs.extend(added)
    try:
        session = _session(model)
    finally:
        del graph.outputs[known:]
    names = sorted(str(v.name) for v in values.values() if not v.is_graph_input())
    sums: dict[str, np.ndarray] = {}
    counts: dict[str, int] = {}
    for feeds in sensitivity.spread(request.calibration(), 32):
        computed = run_rows(lambda part: session.run(names, part), feeds) if names else []
        found = {**feeds, **dict(zip(names, computed, strict=True))}
        for name in values:
            array = found[name]
            flat = array.reshape(-1, array.shape[-1]).astype(np.float64)
            sums[name] = sums.get(name, 0.0) + (flat * flat).sum(axis=0)
            counts[name] = counts.get(name, 0) + len(flat)
    return {name: sums[str(v.name)] / counts[str(v.name)] for name, v in sources.items() if v is not None}


def _session(model: ir.Model) -> ort.InferenceSession:
    """A session of a graph in memory; its weights are lent, not copied into the protobuf."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    constants = {name: value for name, value in model.graph.initializers.items() if value.const_value is not None}
    lent = {name: value.const_value for name, value in constants.items()
            if value.const_value is not None and value.const_value.nbytes > _SMALL}  # fmt: skip
    held = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(tensor.numpy())) for tensor in lent.values()]
    for name, tensor in lent.items():
        constants[name].const_value = ir.ExternalTensor("lent", 0, tensor.nbytes, tensor.dtype, name=name,
                                                        shape=ir.Shape(sizes(tensor)))  # fmt: skip
    try:
        proto = ir.to_proto(model).SerializeToString()
    finally:
        for name, tensor in lent.items():
            constants[name].const_value = tensor
    options.add_external_initializers(list(lent), held)
    return ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])

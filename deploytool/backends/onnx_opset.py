"""Raises a graph's operator set, for types that older sets do not have: fp8 came with 19, int4 in blocks with 21."""

from __future__ import annotations

from collections.abc import Iterator

import onnx.version_converter
from onnx import GraphProto, ModelProto, NodeProto

from deploytool.backends.onnx_half import bodies
from deploytool.errors import InputRefused

_WIDENED_FROM = 18  # from here to 21 all operators only take more than before, but for those below
_CHANGED = {"DFT": 20, "GridSample": 20, "GroupNormalization": 21}
_IR_VERSIONS = {19: 9, 21: 10}


def raise_opset(model: ModelProto, version: int) -> ModelProto:
    """The graph with operator set `version` (19 or 21) or a later one of its own; the model may be changed.

    Raises InputRefused DT310 for operators that mean something else there, by node, and for graphs that are too old to
    be converted.
    """
    entry = _entry(model)
    if entry.version >= version:
        return model
    changed = [f"operator {n.op_type}, node {n.name or n.output[0]}" for n in _nodes(model.graph)
               if entry.version < _CHANGED.get(n.op_type, 0) <= version]  # fmt: skip
    if changed:
        raise InputRefused("DT310", f"the graph must keep its meaning in operator set {version} (got {len(changed)} "
                           "operators that do not)", detail=changed[:5],
                           fix=f"export the model with operator set {version}, or choose trt")  # fmt: skip
    if entry.version < _WIDENED_FROM:
        try:
            model = onnx.version_converter.convert_version(model, _WIDENED_FROM)
        except Exception as error:  # ConvertError, RuntimeError, and what its checker raises
            raise InputRefused("DT310", f"the graph must be one that onnx can convert from operator set "
                               f"{entry.version} (got: {str(error)[:300]})",
                               fix=f"export the model with operator set {_WIDENED_FROM}") from error  # fmt: skip
    _entry(model).version = version
    model.ir_version = max(model.ir_version, _IR_VERSIONS[version])
    return model


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Those in bodies (If, Loop) too."""
    for node in graph.node:
        yield node
        for body in bodies(node):
            yield from _nodes(body)


def _entry(model: ModelProto) -> onnx.OperatorSetIdProto:
    entry: onnx.OperatorSetIdProto
    entry = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return entry

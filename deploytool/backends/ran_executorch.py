"""What an ExecuTorch program runs: the instructions of its plan, and of each part that XNNPACK runs the graph inside.

The plan is fixed in the file, sizes at the largest that it was built for; flops are counted at these.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.exported import quiet
from deploytool.backends.ran import Node, Shape, convolution, product
from deploytool.signature import Feeds

with quiet():  # its parts warn of each other while they are imported
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader, _get_schema_bytes
    from executorch.exir._serialize import _flatbuffer
    from executorch.exir._serialize._program import deserialize_pte_binary
    from executorch.exir.scalar_type import ScalarType
    from executorch.exir.schema import DelegateCall, KernelCall

_PLACES = {"XnnpackBackend": "XNNPACK"}
_TYPES = {ScalarType.FLOAT: "fp32", ScalarType.HALF: "fp16", ScalarType.BFLOAT16: "bf16", ScalarType.DOUBLE: "fp64",
          ScalarType.CHAR: "int8", ScalarType.BYTE: "int8"}  # fmt: skip
_DATATYPES = {"fp32": "fp32", "fp16": "fp16", "qint8": "int8", "quint8": "int8", "qdint8": "int8", "qcint8": "int8",
              "qpint8": "int8"}  # fmt: skip
_OWN = "executorch_prim::"  # views and arithmetic on sizes


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """The nodes of the program; `feeds` are not needed."""
    with quiet():
        program = deserialize_pte_binary(artifact.main_file.read_bytes()).program
    plan = program.execution_plan[0]
    nodes: list[Node] = []
    for instruction in (instruction for chain in plan.chains for instruction in chain.instructions):
        call = instruction.instr_args
        if isinstance(call, DelegateCall):
            delegate = plan.delegates[call.delegate_index]
            nodes += _delegated(delegate.id, program.backend_delegate_data[delegate.processed.index].data)
        elif isinstance(call, KernelCall) and not plan.operators[call.op_index].name.startswith(_OWN):
            nodes.append(_called(plan.operators[call.op_index].name, [plan.values[index].val for index in call.args]))
    return "the program's own plan, at its largest sizes", nodes


def _called(name: str, arguments: Sequence[Any]) -> Node:
    """One of ExecuTorch's own kernels; its result is the last of its arguments."""
    tensors = [value for value in arguments if hasattr(value, "scalar_type") and hasattr(value, "sizes")]
    op, shapes = name.rpartition("::")[2], [list(tensor.sizes) for tensor in tensors]
    precision = _TYPES.get(tensors[-1].scalar_type, "other") if tensors else "other"
    return Node(op, precision, _flops(op, shapes))


def _flops(op: str, shapes: Sequence[Shape]) -> int | None:
    if op in ("mm", "bmm"):
        return product(shapes[0], shapes[-1])
    if op in ("addmm", "linear"):
        return product(shapes[1 if op == "addmm" else 0], shapes[-1])
    if op == "convolution":
        return None if len(shapes) < 3 else convolution(shapes[-1], shapes[1][1:])
    return None if op in ("lstm", "gru", "einsum") else 0


def _delegated(backend: str, data: bytes) -> Iterator[Node]:
    place = _PLACES.get(backend, backend)
    if place != "XNNPACK":
        yield Node(backend, "other", None, place=place)
        return
    graph = _graph(data)
    values = dict(map(_value, graph["xvalues"]))
    for node in graph["xnodes"]:
        kind, inner = node["xnode_union_type"].removeprefix("XNN"), node["xnode_union"]
        clamped = kind != "Clamp" and "output_min_max" in node
        yield Node(kind, _precision(inner, values), _count(kind, inner, values), clamped, place)


def _graph(data: bytes) -> dict[str, Any]:
    """XNNPACK's part as the JSON that the compiler's own schema makes of it."""
    header = XNNHeader.from_bytes(data[: XNNHeader.EXPECTED_LENGTH])
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        schema, binary = Path(folder, "schema.fbs"), Path(folder, "graph.bin")
        schema.write_bytes(_get_schema_bytes())
        binary.write_bytes(data[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size])
        _flatbuffer._flatc_decompile(folder, str(schema), str(binary))
        text = re.sub(r"(-?)\binf\b", r"\1Infinity", Path(folder, "graph.json").read_text(encoding="utf-8"))
    graph: dict[str, Any] = json.loads(text)
    return graph


def _value(value: Mapping[str, Any]) -> tuple[int, tuple[str, list[int]]]:
    """A tensor by its number: type and shape."""
    inner = value["xvalue_union"]
    tensor = inner.get("tensor_value", inner)
    return tensor["id_out"], (tensor["datatype"].removeprefix("xnn_datatype_"), tensor.get("dims", []))


def _precision(node: Mapping[str, Any], values: Mapping[int, tuple[str, list[int]]]) -> str:
    """What a node computes in: of a layer that of its input and weight, of others that of their result."""
    if "filter_id" not in node:
        return _DATATYPES.get(values[node["output_id"]][0], "other") if "output_id" in node else "other"
    given, weight = (_DATATYPES.get(values[node[key]][0], "int4") for key in ("input1_id", "filter_id"))
    return weight if given == weight else "low-bit weights" if weight.startswith("int") else given


def _count(kind: str, node: Mapping[str, Any], values: Mapping[int, tuple[str, list[int]]]) -> int | None:
    if "filter_id" not in node:
        if kind != "BatchMatrixMultiply":
            return None if kind == "ScaledDotProductAttention" else 0
        return product(values[node["input1_id"]][1], values[node["output_id"]][1])
    given, weight, out = (values[node[key]][1] for key in ("input1_id", "filter_id", "output_id"))
    if kind == "FullyConnected":
        return product(given, out)
    # Filters are [outputs, height, width, inputs of a group], depthwise ones [1, height, width, outputs].
    inputs = 1 if kind == "DepthwiseConv2d" else weight[-1]
    return convolution(given if "Transpose" in kind else out, [*weight[1:-1], inputs])

"""Reading and changing ONNX graphs: who made a value, which number a constant holds, new nodes and constants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


def made_by(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value` when it is one of these operators, else None."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def before(node: ir.Node | None, index: int, *op_types: str) -> ir.Node | None:
    """The node that makes the input `index` of `node` when it is one of these operators, else None."""
    return made_by(node.inputs[index], *op_types) if node is not None and index < len(node.inputs) else None


def only_user(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that alone uses `value`, when it is one of these operators and the value is no output of the graph."""
    if value is None or value.is_graph_output():
        return None
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and users[0].op_type in op_types else None


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The numbers of a constant, None for anything that is computed."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def scalar(value: ir.Value | None) -> float | None:
    """The number of a constant of one element, None for anything else."""
    array = constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 else None


def with_scalar(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """The computed input and the number of a product or sum of two, in either order."""
    if node is None or len(node.inputs) != 2:
        return None
    for value, other in (node.inputs, node.inputs[::-1]):
        number = scalar(other)
        if number is not None and value is not None:
            return value, number
    return None


def sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a constant."""
    return tuple(map(int, tensor.shape.numpy()))


def is_weight(value: ir.Value | None, rank: int = 2) -> bool:
    """Whether a value is a constant float tensor of this rank."""
    tensor = value.const_value if value is not None else None
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) == rank


class Maker:
    """Makes nodes with one output at one place of a graph, in order: in front of `place`, else of the first node."""

    def __init__(self, graph: ir.Graph, place: ir.Node | None = None, domain: str = "") -> None:
        self._graph = graph
        self._place = place or graph[0]
        self._domain = domain

    def __call__(self, op_type: str, inputs: Sequence[ir.Value | None], name: str | None = None, **attributes: Any
                 ) -> ir.Value:  # fmt: skip
        """The output of a new node; `name` is the output's."""
        node = ir.node(op_type, list(inputs), attributes, domain=self._domain)
        self._graph.insert_before(self._place, node)
        if name is not None:
            node.outputs[0].name = name
        return node.outputs[0]

    def constant(self, array: np.ndarray, name: str | None = None) -> ir.Value:
        """A constant of the graph; without a name equal ones share one."""
        array = np.asarray(array)
        name = name or f"const_{array.dtype}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        if name not in self._graph.initializers:
            tensor = ir.tensor(array, name=name)
            self._graph.register_initializer(ir.Value(name=name, const_value=tensor, shape=ir.Shape(array.shape),
                                                      type=ir.TensorType(tensor.dtype)))  # fmt: skip
        return self._graph.initializers[name]

    def number(self, value: int) -> ir.Value:
        """An int64 of rank 0."""
        return self.constant(np.array(value, np.int64))

    def numbers(self, values: Sequence[int]) -> ir.Value:
        """int64 [n]."""
        return self.constant(np.array(values, np.int64))

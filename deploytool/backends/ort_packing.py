"""Matrix products of one input as one product: queries, keys and values; gate and up.

A decoding step multiplies one row with every weight; each product wakes the threads, so fewer and larger ones win.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from deploytool.backends.onnx_edit import before, is_weight, made_by, only_user, sizes


def pack_products(graph: ir.Graph) -> int:
    """Join, in place, the products of each attention and of each gated layer; returns how many were saved."""
    saved = 0
    for node in list(graph):
        if node.op_type == "GroupQueryAttention":
            saved += _pack_attention(graph, node)
        elif node.op_type == "Mul":
            saved += _pack_gate(graph, node)
    return saved


def _pack_attention(graph: ir.Graph, attention: ir.Node) -> int:
    """GroupQueryAttention takes queries, keys and values in one tensor: nothing has to be split again."""
    products = [only_user_of(value, attention) for value in attention.inputs[:3]]
    joined = _joined(graph, products)
    if joined is None:
        return 0
    attention.replace_input_with(0, joined)
    attention.replace_input_with(1, None)
    attention.replace_input_with(2, None)
    return len(products) - 1


def _pack_gate(graph: ir.Graph, product: ir.Node) -> int:
    """silu(gate) * up, where silu(x) = x * sigmoid(x): one product, split in two."""
    for index in (0, 1):
        silu, up = before(product, index, "Mul"), before(product, 1 - index, "MatMul")
        sigmoid = before(silu, 1, "Sigmoid") or before(silu, 0, "Sigmoid")
        gate = before(sigmoid, 0, "MatMul")
        if silu is None or up is None or gate is None or gate.outputs[0] not in silu.inputs:
            continue
        users = {node for node, _ in gate.outputs[0].uses()}
        if users != {silu, sigmoid} or only_user(up.outputs[0], "Mul") is not product:
            continue
        joined = _joined(graph, [gate, up], alike=True)
        if joined is None:
            return 0
        parts = ir.node("Split", [joined], {"axis": -1, "num_outputs": 2}, num_outputs=2, name=f"{gate.name}_parts")
        graph.insert_before(silu, parts)
        for old, new in zip((gate, up), parts.outputs, strict=True):
            old.outputs[0].replace_all_uses_with(new)
        return 1
    return 0


def only_user_of(value: ir.Value | None, user: ir.Node) -> ir.Node | None:
    """The MatMul that makes `value`, when `user` alone takes it."""
    node = made_by(value, "MatMul")
    return node if node is not None and [n for n, _ in node.outputs[0].uses()] == [user] else None


def _joined(graph: ir.Graph, products: list[ir.Node | None], alike: bool = False) -> ir.Value | None:
    """The output of one MatMul in place of several of one input with constant weights; None where that cannot be.

    `alike`: only where all have equally many outputs.
    """
    nodes = [node for node in products if node is not None]
    weights = [node.inputs[1] for node in nodes if node.inputs[1] is not None and is_weight(node.inputs[1])]
    if len(weights) != len(products) or any(node.inputs[0] is not nodes[0].inputs[0] for node in nodes):
        return None
    if any(len(weight.uses()) != 1 for weight in weights):
        return None
    tensors = [weight.const_value for weight in weights if weight.const_value is not None]
    columns = [sizes(tensor)[1] for tensor in tensors]
    if alike and len(set(columns)) != 1:
        return None
    shape = ir.Shape([sizes(tensors[0])[0], sum(columns)])
    name = "+".join(str(weight.name) for weight in weights)
    whole = ir.LazyTensor(lambda: ir.tensor(np.concatenate([t.numpy() for t in tensors], axis=1)),
                          dtype=tensors[0].dtype, shape=shape, name=name)  # fmt: skip
    value = ir.Value(name=name, const_value=whole, shape=shape, type=ir.TensorType(whole.dtype))
    graph.register_initializer(value)
    joined = ir.node("MatMul", [nodes[0].inputs[0], value], name="+".join(str(node.name) for node in nodes))
    graph.insert_before(nodes[0], joined)
    return joined.outputs[0]

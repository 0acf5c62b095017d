"""Weight-only quantization for ONNX Runtime: matrix products as MatMulNBits, embeddings as GatherBlockQuantized.

Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md. An embedding whose table is also
the head is stored once: both operators read the same codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploytool.backends.onnx_edit import Maker, is_weight, made_by, sizes
from deploytool.backends.ort_groups import Grouped, grouped
from deploytool.backends.tables import ACCURACY_LEVELS

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class Plan:
    """How a matrix is stored: `bits` 4 or 8 in groups of `group`; `activations` "fp32" or "int8" during the product."""

    bits: int
    group: int
    activations: str


@dataclass(frozen=True)
class Product:
    """A node that reads a constant matrix: a MatMul or Gemm, or the Gather of an embedding."""

    node: ir.Node
    weight: ir.Value
    turned: bool  # the constant is [outputs, inputs]: an embedding, or a head that shares its table

    @property
    def name(self) -> str:
        """The weight's; a tied head has the embedding's."""
        return str(self.weight.name)

    @property
    def columns(self) -> int:
        """How many inputs a row has."""
        return self._size(1 if self.turned else 0)

    @property
    def size(self) -> int:
        """How many weights there are."""
        return self._size(0) * self._size(1)

    def rows(self) -> np.ndarray:
        """The matrix, float32 [outputs, inputs]."""
        array = self._tensor.numpy()
        return array if self.turned else np.ascontiguousarray(array.T)

    @property
    def _tensor(self) -> ir.TensorProtocol:
        assert self.weight.const_value is not None  # `products` and `embedded` find constants only
        return self.weight.const_value

    def _size(self, axis: int) -> int:
        return sizes(self._tensor)[axis]


def products(graph: ir.Graph) -> list[Product]:
    """Every matrix product with a constant float matrix, in order."""
    found = []
    for node in graph:
        weight = node.inputs[1] if node.op_type in ("MatMul", "Gemm") else None
        if weight is not None and node.op_type == "Gemm":
            if is_weight(weight) and _is_linear(node):
                found.append(Product(node, weight, node.attributes.get_int("transB", 0) == 1))
            continue
        turn = made_by(weight, "Transpose")
        if weight is not None and is_weight(weight):
            found.append(Product(node, weight, False))
        elif turn is not None and turn.inputs[0] is not None and is_weight(turn.inputs[0]):
            found.append(Product(node, turn.inputs[0], True))
    return found


def _is_linear(gemm: ir.Node) -> bool:
    """Whether a Gemm is input @ weight + bias, with one bias per output."""
    plain = all(gemm.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    return plain and gemm.attributes.get_int("transA", 0) == 0 and (bias is None or is_weight(bias, rank=1))


def embedded(graph: ir.Graph) -> list[Product]:
    """Every lookup of rows in a constant float table by tokens of two dimensions, in order."""
    found = []
    for node in graph:
        table, index = (node.inputs[0], node.inputs[1]) if node.op_type == "Gather" else (None, None)
        first = node.attributes.get_int("axis", 0) == 0
        if table is not None and index is not None and first and is_weight(table) and index.const_value is None:
            found.append(Product(node, table, True))
    return found


def rounded_matrix(product: Product, plan: Plan, importance: np.ndarray | None = None) -> Grouped:
    """The matrix of a product in the bits of its plan; see `ort_groups.grouped`."""
    return grouped(product.rows(), plan.bits, plan.group, importance)


def compress_weights(
    model: ir.Model, plans: Mapping[str, Plan], importance: Mapping[str, np.ndarray] | None = None,
    given: Mapping[str, Grouped] | None = None,
) -> dict[str, Grouped]:  # fmt: skip
    """Rewrite `model` in place; returns what each matrix became, by the name of its weight.

    plans        how each weight is stored; those that are not named stay fp32
    importance   mean square of each input of a weight's product
    given        matrices that were rounded before: taken as they are
    """
    graph, done = model.graph, dict(given or {})
    for product in (*products(graph), *embedded(graph)):
        plan = plans.get(product.name)
        if plan is None:
            continue
        if product.name not in done:
            done[product.name] = rounded_matrix(product, plan, (importance or {}).get(product.name))
        matrix = done[product.name]
        if product.node.op_type in ("MatMul", "Gemm"):
            _replace_product(graph, product, matrix, plan)
        elif matrix.codes.shape[1] * matrix.group == product.columns:
            _replace_gather(graph, product.node, product.name, matrix)
    return done


def _stored(graph: ir.Graph, name: str, matrix: Grouped) -> tuple[ir.Value, ir.Value, ir.Value]:
    make = Maker(graph)
    return (make.constant(matrix.packed(), f"{name}.codes"), make.constant(matrix.scales, f"{name}.scales"),
            make.constant(matrix.packed_zeros(), f"{name}.zeros"))  # fmt: skip


def _replace_product(graph: ir.Graph, product: Product, matrix: Grouped, plan: Plan) -> None:
    bias = [None, product.node.inputs[2]] if len(product.node.inputs) > 2 and product.node.inputs[2] else []
    node = ir.node(
        "MatMulNBits", [product.node.inputs[0], *_stored(graph, product.name, matrix), *bias],
        {"K": product.columns, "N": len(matrix.codes), "bits": matrix.bits, "block_size": matrix.group,
         "accuracy_level": ACCURACY_LEVELS[plan.activations]},
        domain=MICROSOFT, name=product.node.name,
    )  # fmt: skip
    _put(graph, product.node, node.outputs[0], node)


def _replace_gather(graph: ir.Graph, gather: ir.Node, name: str, matrix: Grouped) -> None:
    """The codes are cut into groups, as a product has them: [rows, groups, group]; they are joined afterwards."""
    codes, _, _ = _stored(graph, name, matrix)
    make = Maker(graph, gather)
    scales = make.constant(matrix.scales[..., None], f"{name}.row_scales")
    zeros = make.constant(matrix.zeros[..., None], f"{name}.row_zeros")
    node = ir.node(
        "GatherBlockQuantized", [codes, gather.inputs[1], scales, zeros],
        {"bits": matrix.bits, "block_size": matrix.group, "gather_axis": 0, "quantize_axis": 2}, domain=MICROSOFT,
        name=gather.name,
    )  # fmt: skip
    graph.insert_before(gather, node)
    joined = ir.node("Reshape", [node.outputs[0], make.numbers([0, 0, -1])])
    _put(graph, gather, joined.outputs[0], joined)


def _put(graph: ir.Graph, old: ir.Node, value: ir.Value, node: ir.Node) -> None:
    graph.insert_before(old, node)
    was = old.outputs[0]
    value.name, value.type, value.shape = was.name, was.type, was.shape
    was.name = f"{was.name}_unused"
    was.replace_all_uses_with(value, replace_graph_outputs=True)

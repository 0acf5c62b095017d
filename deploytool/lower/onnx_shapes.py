"""Removes the arithmetic on shapes that a trace leaves in the graph.

A trace writes `x.view(batch, length, 8, 64)` as a dozen nodes that measure tensors, pick, multiply and join their
sizes; SmolLM2 has 2,500 of them, which cost a tenth of each decoded token. Here every small integer tensor is
evaluated as a tuple of parts: a number, the name of a free dimension, or unknown. Then

- a tensor of numbers becomes a constant,
- equal tensors are computed once,
- Reshape copies a dimension that stays in its place (ONNX's 0) and Expand keeps it (1) instead of being told it.

Shapes must have been inferred before, with `forget_guesses` in front of every inference. Names of dimensions are taken
at their word: equal names, equal sizes.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

Part = int | str | None
Parts = tuple[Part, ...]
_SMALL = 16


def simplify_shapes(model: ir.Model) -> bool:
    """One sweep over the main graph; True where anything changed, which lets another inference find more."""
    known: dict[ir.Value, Parts] = {}
    first: dict[tuple[Parts, int], ir.Value] = {}
    changed = False
    for node in list(model.graph):
        if node.domain == "" and node.op_type in ("Reshape", "Expand"):
            changed |= _free_of_sizes(model.graph, node, known)
        parts = _evaluate(node, known)
        if parts is None:
            continue
        value = node.outputs[0]
        known[value] = parts
        rank = None if value.shape is None else len(value.shape)
        if rank is None or rank > 1 or None in parts or value.dtype != ir.DataType.INT64 or value.is_graph_output():
            continue
        if all(isinstance(part, int) for part in parts):
            same = _constant(model.graph, f"{value.name}_folded", parts, rank)
        else:
            same = first.setdefault((parts, rank), value)
        if same is not value:
            known[same] = parts
            value.replace_all_uses_with(same)
            changed = True
    return changed


def _constant(graph: ir.Graph, name: str, parts: Parts, rank: int) -> ir.Value:
    array = np.array(parts if rank else parts[0], dtype=np.int64)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64),
                     const_value=ir.Tensor(array, name=name))  # fmt: skip
    graph.register_initializer(value)
    return value


def _dims(value: ir.Value | None) -> Parts | None:
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def _parts(value: ir.Value | None, known: dict[ir.Value, Parts]) -> Parts | None:
    if value is None:
        return None
    constant = value.const_value
    if constant is not None and constant.size <= _SMALL and constant.dtype in (ir.DataType.INT64, ir.DataType.BOOL):
        return tuple(int(number) for number in constant.numpy().reshape(-1))
    return known.get(value)


def _evaluate(node: ir.Node, known: dict[ir.Value, Parts]) -> Parts | None:
    rule = _RULES.get(node.op_type)
    if rule is None or node.domain != "" or len(node.outputs) != 1:
        return None
    if node.op_type == "Shape":
        return _shape(node)
    parts = [_parts(value, known) for value in node.inputs]
    if not parts or any(p is None for p in parts):
        return None
    result = rule(node, [p for p in parts if p is not None])
    return result if result is not None and len(result) <= _SMALL else None


def _shape(node: ir.Node) -> Parts | None:
    dims = _dims(node.inputs[0])
    start, end = (node.attributes[k].as_int() if k in node.attributes else None for k in ("start", "end"))
    return None if dims is None else dims[start:end]


def _same(node: ir.Node, parts: list[Parts]) -> Parts | None:
    return parts[0]


def _cast(node: ir.Node, parts: list[Parts]) -> Parts | None:
    return parts[0] if node.attributes["to"].as_int() == ir.DataType.INT64 else None


def _concat(node: ir.Node, parts: list[Parts]) -> Parts | None:
    return tuple(part for group in parts for part in group)


def _gather(node: ir.Node, parts: list[Parts]) -> Parts | None:
    data, indices = parts
    if all(isinstance(i, int) and -len(data) <= i < len(data) for i in indices):
        return tuple(data[i] for i in indices if isinstance(i, int))
    return None


def _slice(node: ir.Node, parts: list[Parts]) -> Parts | None:
    bounds = [p[0] for p in (parts[1], parts[2], parts[4] if len(parts) > 4 else (1,)) if len(p) == 1]
    if len(bounds) == 3 and all(isinstance(b, int) for b in bounds):
        return parts[0][slice(*bounds)]  # type: ignore[arg-type]  # all are numbers
    return None


def _fill(node: ir.Node, parts: list[Parts]) -> Parts | None:
    count = parts[0]
    filler = node.attributes["value"].as_tensor().numpy() if "value" in node.attributes else np.zeros(1)
    if len(count) != 1 or not isinstance(count[0], int) or count[0] > _SMALL or filler.dtype != np.int64:
        return None
    return (int(filler[0]),) * count[0]


def _where(node: ir.Node, parts: list[Parts]) -> Parts | None:
    return _elementwise(parts, lambda c, a, b: None if c is None else (a if c else b))


def _equal_part(a: Part, b: Part) -> Part:
    if isinstance(a, int) and isinstance(b, int):
        return int(a == b)
    if isinstance(a, str) and a == b:
        return 1
    negative = any(isinstance(part, int) and part < 0 for part in (a, b))
    return 0 if negative and None not in (a, b) else None  # a size is never negative


def _arithmetic(numbers: Callable[[int, int], int]) -> Callable[[ir.Node, list[Parts]], Parts | None]:
    def rule(node: ir.Node, parts: list[Parts]) -> Parts | None:
        return _elementwise(parts, lambda a, b: numbers(a, b) if isinstance(a, int) and isinstance(b, int) else None)

    return rule


def _elementwise(parts: list[Parts], combine: Callable[..., Part]) -> Parts | None:
    length = max(map(len, parts))
    if any(len(p) not in (1, length) for p in parts):
        return None
    return tuple(combine(*(p[i if len(p) > 1 else 0] for p in parts)) for i in range(length))


def _quotient(a: int, b: int) -> int:
    return int(a / b) if b else 0  # ONNX truncates; sizes are far below 2^53


_RULES: dict[str, Callable[[ir.Node, list[Parts]], Parts | None]] = {
    "Shape": _same, "Identity": _same, "Cast": _cast, "Concat": _concat, "Gather": _gather, "Slice": _slice,
    "Squeeze": lambda node, parts: parts[0], "Unsqueeze": lambda node, parts: parts[0],
    "Reshape": lambda node, parts: parts[0], "ConstantOfShape": _fill, "Where": _where,
    "Equal": lambda node, parts: _elementwise(parts, _equal_part),
    "Add": _arithmetic(lambda a, b: a + b), "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b), "Div": _arithmetic(_quotient),
}  # fmt: skip


def _free_of_sizes(graph: ir.Graph, node: ir.Node, known: dict[ir.Value, Parts]) -> bool:
    """Give Reshape or Expand a constant shape where every dimension is a number or stays as it is."""
    shape, dims = node.inputs[1], _dims(node.inputs[0])
    parts = _parts(shape, known)
    if shape is None or shape.const_value is not None or parts is None or dims is None or 0 in parts:
        return False
    if node.op_type == "Reshape":
        if "allowzero" in node.attributes and node.attributes["allowzero"].as_int():
            return False
        kept: list[Part] = [0 if isinstance(p, str) and i < len(dims) and dims[i] == p else p
                            for i, p in enumerate(parts)]  # fmt: skip
    else:
        behind = len(parts) - len(dims)
        _declare_expanded(node.outputs[0], parts, dims)
        kept = [1 if isinstance(p, str) and i >= behind and dims[i - behind] == p else p for i, p in enumerate(parts)]
    if not all(isinstance(part, int) for part in kept):
        return False
    node.replace_input_with(1, _constant(graph, f"{node.outputs[0].name}_shape", tuple(kept), 1))
    return True


def _declare_expanded(value: ir.Value, parts: Parts, dims: Parts) -> None:
    """torch's expand gives just the sizes that it is asked for, where ONNX's could give larger ones; 1 keeps."""
    if value.shape is not None and len(value.shape) == len(parts) >= len(dims):
        old = (1,) * (len(parts) - len(dims)) + dims
        value.shape = ir.Shape([dim if part == 1 else part for part, dim in zip(parts, old, strict=True)])


def forget_guesses(graph: ir.Graph) -> None:
    """Drop the names that inference invented for inner dimensions: the next inference would keep them as they are."""
    declared = {dim for value in (*graph.inputs, *graph.outputs) for dim in _dims(value) or () if isinstance(dim, str)}
    for node in graph:
        for value in node.outputs:
            dims = _dims(value)
            if dims is not None and not value.is_graph_output():
                value.shape = ir.Shape([d if isinstance(d, int) or d in declared else None for d in dims])

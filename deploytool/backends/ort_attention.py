"""Attention with a cache as ONNX Runtime's GroupQueryAttention: rotary angles, cache, mask and softmax in one node.

A traced layer rotates queries and keys, appends to the cache, repeats the keys of a group for its heads, and computes
scores, softmax and mixture in some forty nodes, each of which every decoded token pays for; and it copies the whole
cache. The operator writes into the cache that it was given where past and present are one buffer. What does not look
like this is left as it is.

Operator: com.microsoft.GroupQueryAttention,
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from deploytool.backends.onnx_edit import Maker, before, constant, made_by, only_user, sizes, with_scalar
from deploytool.decoding import PAST

MICROSOFT = "com.microsoft"
_VECTOR = 16  # the operator rotates heads whose width is a multiple of it, and refuses others when it runs


@dataclass(frozen=True)
class _Angles:
    """cos and sin of position_ids * `speeds`, each times `factor`."""

    speeds: ir.Value  # [width / 2]
    factor: float


@dataclass(frozen=True)
class _Heads:
    """A projection [batch, sequence, heads * width] before it was split into heads, and rotated where `angles` says."""

    flat: ir.Value
    width: int
    angles: _Angles | None = None


@dataclass(frozen=True)
class _Cached:
    """Keys or values with their cache: inputs and outputs of the graph, [batch, groups, length, width]."""

    past: ir.Value
    new: _Heads
    present: ir.Value

    groups: int


@dataclass(frozen=True)
class _Layer:
    query: _Heads
    key: _Cached
    value: _Cached
    mask: ir.Value
    scale: float
    end: ir.Node


def fuse_attention(graph: ir.Graph) -> int:
    """Replace, in place, the attention of every layer, and return how many there are; 0 where one does not match.

    A decoder gives all layers' past and present one buffer each, which only the operator can write into.
    """
    inputs = {str(v.name): v for v in graph.inputs}
    layers = [layer for node in graph if node.op_type == "Softmax" and (layer := _match(node))]
    if not layers or not {"position_ids", "attention_mask"} <= inputs.keys():
        return 0
    layers = [layer for layer in layers if layer.query.angles == layers[0].query.angles]
    done = {cached.past.name for layer in layers for cached in (layer.key, layer.value)}
    if done != {name for name in inputs if name.startswith(PAST)}:
        return 0
    shared = [*_lengths(graph, inputs), *_tables(graph, inputs, layers[0].query.angles)]
    for layer in layers:
        _replace(graph, layer, shared)
    return len(layers)


def _match(softmax: ir.Node) -> _Layer | None:
    """The layer around a softmax, None where any part of it is not as expected."""
    masked = before(softmax, 0, "Add")
    scores = before(masked, 0, "MatMul")
    scaled = with_scalar(before(scores, 0, "Mul"))
    turned = before(scores, 1, "Transpose")
    mixed = only_user(softmax.outputs[0], "MatMul")
    back = only_user(mixed.outputs[0], "Transpose") if mixed else None
    end = only_user(back.outputs[0], "Reshape") if back else None
    if masked is None or masked.inputs[1] is None or scaled is None or turned is None or mixed is None or end is None:
        return None
    query, key, value = _rotated(scaled[0]), _cached(turned.inputs[0]), _cached(mixed.inputs[1])
    if query is None or key is None or value is None or query.angles is None or not _count(query):
        return None
    if query.width % _VECTOR:
        return None
    if key.new.angles != query.angles or value.new.angles is not None or key.groups != value.groups:
        return None
    return _Layer(query, key, value, masked.inputs[1], scaled[1], end)


def _cached(value: ir.Value | None) -> _Cached | None:
    """Keys or values, which may have been repeated for the heads of a group."""
    wide = before(made_by(value, "Reshape"), 0, "Expand")
    one = before(wide, 0, "Unsqueeze")
    present = one.inputs[0] if one else value
    joined = made_by(present, "Concat")
    if joined is None or present is None or len(joined.inputs) != 2 or not present.is_graph_output():
        return None
    past, new = joined.inputs
    heads = _rotated(new) or _heads(new)
    if past is None or heads is None or not past.is_graph_input() or past.shape is None:
        return None
    groups = past.shape[1]
    return _Cached(past, heads, present, groups) if isinstance(groups, int) else None


def _heads(value: ir.Value | None) -> _Heads | None:
    """Transpose(Reshape(flat)) to [batch, heads, sequence, width]."""
    turned = made_by(value, "Transpose")
    split = before(turned, 0, "Reshape")
    shape = constant(split.inputs[1]) if split else None
    if turned is None or split is None or shape is None or shape.size != 4 or split.inputs[0] is None:
        return None
    ordered = list(turned.attributes["perm"].as_ints()) == [0, 2, 1, 3]
    return _Heads(split.inputs[0], int(shape[3])) if ordered and shape[3] > 0 else None


def _rotated(value: ir.Value | None) -> _Heads | None:
    """x * cos + concat(-x[half:], x[:half]) * sin, as Llama and its kin rotate (Su et al. 2021, eq. 34)."""
    total = made_by(value, "Add")
    straight, crossed = before(total, 0, "Mul"), before(total, 1, "Mul")
    swapped = before(crossed, 0, "Concat")
    negative, first = before(before(swapped, 0, "Neg"), 0, "Slice"), before(swapped, 1, "Slice")
    if straight is None or crossed is None or negative is None or first is None:
        return None
    heads, angles = _heads(straight.inputs[0]), _angles(straight.inputs[1], crossed.inputs[1])
    half = heads.width // 2 if heads else 0
    same = negative.inputs[0] is straight.inputs[0] and first.inputs[0] is straight.inputs[0]
    if heads is None or angles is None or not same or len(swapped.inputs if swapped else ()) != 2:
        return None
    if _span(negative)[0] != half or _span(first) != (0, half):
        return None
    return _Heads(heads.flat, heads.width, angles)


def _span(cut: ir.Node) -> tuple[int, int]:
    """First and last index of a Slice along one axis, of which only the last is known to be meant; (-1, -1) else."""
    start, end, axis = (constant(v) for v in cut.inputs[1:4])
    if start is None or end is None or axis is None or start.size != 1 or int(axis[0]) not in (3, -1):
        return -1, -1
    return int(start[0]), int(end[0])


def _angles(cos: ir.Value | None, sin: ir.Value | None) -> _Angles | None:
    """The angles behind Unsqueeze(cos(concat(a, a)) * factor), where a = position_ids[..., None] * speeds."""
    sides = [_side(value, name) for value, name in ((cos, "Cos"), (sin, "Sin"))]
    if sides[0] is None or sides[0] != sides[1]:
        return None
    twice = made_by(sides[0][0], "Concat")
    if twice is None or len(twice.inputs) != 2 or twice.inputs[0] is not twice.inputs[1]:
        return None
    product = made_by(twice.inputs[0], "Mul")
    position, speeds = (product.inputs[0], product.inputs[1]) if product else (None, None)
    wide = before(made_by(position, "Cast"), 0, "Unsqueeze")
    if wide is None or wide.inputs[0] is None or wide.inputs[0].name != "position_ids":
        return None
    if speeds is None or speeds.const_value is None or len(speeds.const_value.shape) != 1:
        return None
    return _Angles(speeds, sides[0][1])


def _side(value: ir.Value | None, name: str) -> tuple[ir.Value | None, float] | None:
    wide = made_by(value, "Unsqueeze")
    scaled = with_scalar(before(wide, 0, "Mul"))
    inner = scaled[0] if scaled else (wide.inputs[0] if wide else None)
    turned = made_by(inner, name)
    return (turned.inputs[0], scaled[1] if scaled else 1.0) if turned else None


def _lengths(graph: ir.Graph, inputs: dict[str, ir.Value]) -> list[ir.Value]:
    """seqlens_k, int32 [batch]: past and new tokens less one; total_sequence_length, int32 []."""
    make = Maker(graph)
    shape = make("Shape", [inputs["attention_mask"]])
    total = make("Cast", [make("Gather", [shape, make.number(1)])], to=6)
    rows = make("Gather", [shape, make.numbers([0])])
    last = make("Sub", [total, make.constant(np.array(1, np.int32))])
    return [make("Expand", [last, rows]), total]


def _tables(graph: ir.Graph, inputs: dict[str, ir.Value], angles: _Angles | None) -> list[ir.Value]:
    """cos and sin of every given position, [positions, width / 2], and where in them each token's angles stand.

    In a prompt the operator reads the table from its start for every row, whatever position_ids says. So the table is
    of the positions that were given, and the graph takes several rows or several tokens, but not both: the reshape
    below fails then, where the operator would fill the cache with wrong keys. The table must have as many rows as
    there are tokens in all.
    """
    assert angles is not None  # layers without angles do not match
    make, positions = Maker(graph), inputs["position_ids"]
    shape = make("Shape", [positions])
    count = make("ReduceMax", [shape], keepdims=1)
    flat = make("Cast", [make("Reshape", [positions, count])], to=1)
    turns = make("Mul", [make("Unsqueeze", [flat, make.numbers([1])]), angles.speeds])
    total = make("Gather", [make("Shape", [inputs["attention_mask"]]), make.numbers([1])])
    missing = make("Max", [make("Sub", [total, count]), make.numbers([0])])
    pads = make("Concat", [make.numbers([0, 0]), missing, make.numbers([0])], axis=0)
    factor = make.constant(np.array(angles.factor, np.float32))
    tables = [make("Pad", [make("Mul", [make(name, [turns]), factor]), pads]) for name in ("Cos", "Sin")]
    places = make("Range", [make.number(0), make("Squeeze", [count]), make.number(1)])
    return [*tables, make("Reshape", [places, shape])]


def _replace(graph: ir.Graph, layer: _Layer, shared: list[ir.Value]) -> None:
    node = ir.node(
        "GroupQueryAttention",
        [layer.query.flat, layer.key.new.flat, layer.value.new.flat, layer.key.past, layer.value.past, *shared,
         layer.mask],
        {"num_heads": _count(layer.query), "kv_num_heads": layer.key.groups, "scale": layer.scale, "do_rotary": 1},
        domain=MICROSOFT, num_outputs=3, name=f"{layer.end.name}_attention",
    )  # fmt: skip
    graph.insert_before(layer.end, node)
    layer.end.outputs[0].replace_all_uses_with(node.outputs[0])
    for old, new in ((layer.key.present, node.outputs[1]), (layer.value.present, node.outputs[2])):
        new.name, new.type, new.shape = old.name, old.type, old.shape
        old.name = f"{old.name}_unused"
        old.replace_all_uses_with(new, replace_graph_outputs=True)


def _count(heads: _Heads) -> int:
    """How many heads a projection holds: its columns by the width of one."""
    product = made_by(heads.flat, "MatMul") or before(made_by(heads.flat, "Add"), 1, "MatMul") or before(
        made_by(heads.flat, "Add"), 0, "MatMul")  # fmt: skip
    weight = product.inputs[1].const_value if product and product.inputs[1] else None
    return sizes(weight)[1] // heads.width if weight is not None else 0

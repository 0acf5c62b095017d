"""Writes a model to a folder without holding its weights a second time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

ENTRY = "model.onnx"
DATA = "model.onnx.data"
EMBED_LIMIT_BYTES = 100_000_000  # a protobuf file ends at 2 GB and is read into memory whole; large weights are mapped
_PAGE_BYTES = 4096
_INLINE_BYTES = 1024
_WRITERS, _HELD_BYTES = 2, 64_000_000  # one transposes a weight while the other writes; what both hold at most

# Field numbers of onnx.proto, of wire type 2 (length, then bytes), as tags: number * 8 + 2.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = 0x3A, 0x2A, 0x4A


def save(model: ir.Model, folder: Path) -> None:
    """Write `model.onnx`, with the weights inside below 100 MB, else in `model.onnx.data` beside it, page-aligned."""
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            value.const_value = _in_order(value.const_value)
    weights = {n: v.const_value for n, v in model.graph.initializers.items() if v.const_value is not None}
    if sum(tensor.nbytes for tensor in weights.values()) >= EMBED_LIMIT_BYTES:
        ir.save(model, folder / ENTRY, external_data=DATA, size_threshold_bytes=_INLINE_BYTES,
                alignment=_PAGE_BYTES, align_threshold=_PAGE_BYTES, max_workers=_WRITERS,
                max_in_flight_bytes=_HELD_BYTES)  # fmt: skip
        return
    large = {n: t for n, t in weights.items() if isinstance(t, (ir.Tensor, ir.LazyTensor)) and t.nbytes > _INLINE_BYTES
             and t.dtype != ir.DataType.STRING}  # fmt: skip
    apart = [model.graph.initializers.pop(name) for name in large]
    try:
        proto = ir.to_proto(model)
    finally:
        for value in apart:
            model.graph.register_initializer(value)
    with (folder / ENTRY).open("wb") as file:
        _stream(proto, large, file)


def _in_order(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """A transposed weight is a view of the module's; it is copied when written, since NumPy writes views bit by bit."""
    if tensor.numpy().flags.c_contiguous:
        return tensor
    return ir.LazyTensor(lambda: ir.Tensor(np.ascontiguousarray(tensor.numpy()), dtype=tensor.dtype),
                         dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=tensor.name)  # fmt: skip


def _stream(proto: onnx.ModelProto, weights: dict[str, ir.Tensor[Any] | ir.LazyTensor], file: BinaryIO) -> None:
    """The bytes of `proto` with `weights` added to its graph, one weight in memory at a time.

    protobuf's wire format allows the fields of a message in any order; only their lengths must be known beforehand.
    """
    graph = proto.graph.SerializeToString()
    proto.ClearField("graph")
    heads = {name: _head(name, tensor) for name, tensor in weights.items()}
    sizes = {name: len(head) + weights[name].nbytes for name, head in heads.items()}
    total = len(graph) + sum(1 + len(_varint(size)) + size for size in sizes.values())
    file.write(proto.SerializeToString())
    file.write(bytes([_MODEL_GRAPH]) + _varint(total) + graph)
    for name, tensor in weights.items():
        file.write(bytes([_GRAPH_INITIALIZER]) + _varint(sizes[name]) + heads[name])
        tensor.tofile(file)  # no copy, where tobytes() would make one


def _head(name: str, tensor: ir.TensorProtocol) -> bytes:
    """A TensorProto up to its raw data."""
    head = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=tensor.shape.numpy())
    return bytes(head.SerializeToString()) + bytes([_TENSOR_RAW_DATA]) + _varint(tensor.nbytes)


def _varint(number: int) -> bytes:
    return bytes(_septets(number))


def _septets(number: int) -> Iterator[int]:
    while number > 0x7F:
        yield number & 0x7F | 0x80
        number >>= 7
    yield number

"""The encodings of a source under the names that its weights have in the ONNX graph, for backends to write."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploytool.encoding import Coded, save_coded
from deploytool.load.grid import as_matrix, quantize
from deploytool.source import Source

_SAME = 1e-5  # of a row's largest weight: what float32 products of the same numbers may differ by


def write_encodings(source: Source, graph: Path, out: Path) -> list[str]:
    """Write to `out` every encoded weight that is a constant of the graph, as it is, as a matrix, or transposed.

    Exporters rename and transpose weights, so they are found by their content; one whose rows were multiplied by
    numbers (a batch norm that was merged) by its name. Returns the weights that are not found: those that the exporter
    has merged with something else.
    """
    known: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name in source.encodings:
        weight = source.module.get_parameter(name).detach()
        matrix = as_matrix(weight, source.encodings[name].axis).numpy()
        known |= {_key(array): name for array in (matrix, matrix.T, weight.numpy())}
    found: dict[str, Coded] = {}
    placed: set[str] = set()
    shapes = {shape for shape, _ in known}
    for initializer, value in ir.load(graph).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tuple(tensor.shape.numpy()) not in shapes:
            continue
        array = tensor.numpy()
        parameter = known.get(_key(array))
        one = _rescaled(source, initializer, array) if parameter is None else coded(source, parameter)
        if one is not None:
            found[initializer] = one
            placed.add(parameter or initializer)
    save_coded(out, found)
    return sorted(set(source.encodings) - placed)


def coded(source: Source, parameter: str) -> Coded:
    """An encoded parameter of the source as codes."""
    encoding = source.encodings[parameter]
    codes = as_matrix(quantize(source.module.get_parameter(parameter), encoding), encoding.axis)
    return Coded(encoding.bits, encoding.group, codes.numpy(), encoding.scale.numpy(), encoding.zero_point.numpy())


def _rescaled(source: Source, name: str, array: np.ndarray) -> Coded | None:
    """The codes of a parameter whose rows stand in the graph times a number above zero each; None where they do not."""
    if name not in source.encodings or source.encodings[name].axis != 0:
        return None
    one = coded(source, name)
    before, after = one.values(), array.reshape(len(array), -1)
    if before.shape != after.shape:
        return None
    sizes = (before * before).sum(1, keepdims=True)
    factors = np.where(sizes > 0, (before * after).sum(1, keepdims=True) / np.maximum(sizes, 1e-30), 1.0)
    off = np.abs(before * factors - after).max(1, initial=0)
    if not (factors > 0).all() or (off > _SAME * np.abs(after).max(1, initial=0)).any():
        return None
    return replace(one, scale=(one.scale * factors).astype(np.float32))


def _key(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array, np.float32).data).digest()

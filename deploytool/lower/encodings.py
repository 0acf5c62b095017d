"""The encodings of a source under the names that its weights have in the ONNX graph, for backends to write."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx_ir as ir

from deploytool.encoding import Coded, save_coded
from deploytool.load.grid import as_matrix, quantize
from deploytool.source import Source


def write_encodings(source: Source, graph: Path, out: Path) -> list[str]:
    """Write to `out` every encoded matrix that is a constant of the graph, as it is or transposed.

    Exporters rename and transpose weights, so they are found by their content. Returns the weights that are not found:
    those that the exporter has merged with something else.
    """
    known: dict[tuple[tuple[int, ...], bytes], str] = {}
    for name in source.encodings:
        weight = as_matrix(source.module.get_parameter(name).detach(), source.encodings[name].axis).numpy()
        known |= {_key(array): name for array in (weight, weight.T)}
    found: dict[str, Coded] = {}
    placed: set[str] = set()
    shapes = {shape for shape, _ in known}
    for initializer, value in ir.load(graph).graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tuple(tensor.shape.numpy()) not in shapes:
            continue
        parameter = known.get(_key(tensor.numpy()))
        if parameter is not None:
            found[initializer] = coded(source, parameter)
            placed.add(parameter)
    save_coded(out, found)
    return sorted(set(source.encodings) - placed)


def coded(source: Source, parameter: str) -> Coded:
    """An encoded parameter of the source as codes."""
    encoding = source.encodings[parameter]
    codes = as_matrix(quantize(source.module.get_parameter(parameter), encoding), encoding.axis)
    return Coded(encoding.bits, encoding.group, codes.numpy(), encoding.scale.numpy(), encoding.zero_point.numpy())


def _key(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array, np.float32).data).digest()

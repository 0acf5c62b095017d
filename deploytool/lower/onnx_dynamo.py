"""Exports a module to an ONNX graph with torch.export: slower, but sees what a trace fixes."""

from __future__ import annotations

import warnings

import onnx_ir as ir
import torch
from torch import Tensor

from deploytool.load.flat import no_fast_path
from deploytool.lower.onnx_trace import dynamic_axes
from deploytool.source import Source


def export_dynamo(source: Source, example: tuple[Tensor, ...], opset: int) -> ir.Model:
    """The ONNX graph of `source.flat`; raises whatever torch raises when it cannot export the module."""
    axes = dynamic_axes(source.signature)
    shapes = tuple(axes[name] for name in source.signature.input_names)
    with torch.no_grad(), no_fast_path(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own parts about each other; parity judges the result
        program = torch.onnx.export(
            source.flat, example, dynamo=True, opset_version=opset, dynamic_shapes=(shapes,), verbose=False,
            input_names=list(source.signature.input_names), output_names=list(source.signature.output_names),
        )  # fmt: skip
    if program is None:
        raise RuntimeError("the exporter gave no graph")
    return program.model

"""Lowers a source to a portable ONNX artifact: opset 18, named inputs, outputs and free dimensions."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from deploytool.artifact import Artifact, Step, versions
from deploytool.decoding import decodes
from deploytool.errors import InputRefused
from deploytool.load.infer import refuse_non_finite
from deploytool.load.input_grid import InputGrid
from deploytool.load.memory import give_back
from deploytool.load.plain_attention import fused_names, unfuse
from deploytool.lower.export_failure import DATA_DEPENDENT, depends_on_data, reason
from deploytool.lower.onnx_tidy import fold, tidy
from deploytool.lower.onnx_trace import trace
from deploytool.lower.onnx_write import ENTRY, save
from deploytool.signature import Signature, TensorSpec
from deploytool.source import Source
from deploytool.storage import writing

Exporter = Literal["auto", "torchscript", "dynamo"]

OPSET = 18  # the newest that ONNX Runtime, OpenVINO and TensorRT all take; 23 and later fail in ONNX Runtime 1.31
# How the plain ONNX Runtime target opens the graph, every setting: what is known of it then holds for that target too.
# A language model's graph is rewritten for it; what is checked is opened in the cheapest way then.
# Written out: the classes that hold a profile's defaults bring a library that nothing else needs here.
SESSION: dict[str, Any] = {"threads": 0, "spinning": True, "optimization": "all", "without": [], "arena": True,
                           "flush": False}  # fmt: skip
CHECK_ONLY: dict[str, Any] = {**SESSION, "optimization": "extended", "packing": False}
_EXAMPLES_SEEN = 64
_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript")


def lower_onnx(
    source: Source, out: Path, *, exporter: Exporter = "auto", example: tuple[Tensor, ...] | None = None
) -> Artifact:
    """Write `source` into the folder `out` as ONNX in fp32; weights over 100 MB go to one file beside the graph.

    exporter   "torchscript" traces one call; "dynamo" uses torch.export; "auto" traces, and turns to dynamo where
               that fails. Which one it was, and why, is in the history.
    example    tensors in the order of the signature; by default the sample with the most telling sizes

    InputRefused DT304: a weight holds NaN or infinity; DT305: no exporter could do it.
    """
    started = time.perf_counter()
    refuse_non_finite(source.module)
    give_back()  # 40 MB after a batch of MiniLM
    example = choose_example(source.signature, source.samples()) if example is None else example
    model, settings = _export(source, example, exporter)
    out.mkdir(parents=True, exist_ok=True)
    with writing(out):
        save(model, out)
    return Artifact(
        folder=out, backend="onnxruntime", format="onnx", entry=ENTRY, precision="fp32", signature=source.signature,
        settings=(CHECK_ONLY if decodes(source.signature) else SESSION) | _of_grids(source.module),
        history=(Step("lower", settings, versions(_PACKAGES), time.perf_counter() - started),),
    ).save()  # fmt: skip


def _of_grids(module: nn.Module) -> dict[str, Any]:
    """What a graph with learned grids of inputs needs where it runs in floating point.

    ONNX Runtime takes such a graph for one that is to be quantized, and rounds convolutions' weights itself, with one
    scale per tensor: 1 % of the outputs. It must run the nodes as they are written.
    """
    grids = sum(isinstance(inner, InputGrid) for inner in module.modules())
    return {"input_grids": grids, "fuse_qdq": False} if grids else {}


def choose_example(signature: Signature, samples: Iterable[dict[str, Tensor]]) -> tuple[Tensor, ...]:
    """The sample whose free dimensions are all larger than 1 and all different, the smallest of several.

    A dimension of 1, or two of one size, can be taken for a constant by a trace. Where only the leading dimension is
    1, the sample is repeated along it.
    """
    candidates = [
        tuple(sample[name] for name in signature.input_names) for sample in itertools.islice(samples, _EXAMPLES_SEEN)
    ]
    if not candidates:
        raise InputRefused("DT303", "samples() must give at least one sample (got none)")
    return min((_widened(signature, tensors) for tensors in candidates), key=lambda t: _rank(signature, t))


def _sizes(signature: Signature, tensors: tuple[Tensor, ...]) -> dict[str, int]:
    return {
        dim: size
        for spec, tensor in zip(signature.inputs, tensors, strict=True)
        for dim, size in zip(spec.shape, tensor.shape, strict=True)
        if isinstance(dim, str)
    }


def _rank(signature: Signature, tensors: tuple[Tensor, ...]) -> tuple[int, int, int]:
    sizes = list(_sizes(signature, tensors).values())
    return (sum(size < 2 for size in sizes), len(sizes) - len(set(sizes)), sum(t.numel() for t in tensors))


def _widened(signature: Signature, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    for leading in {spec.shape[0] for spec in signature.inputs if spec.shape and isinstance(spec.shape[0], str)}:
        inside = any(leading in spec.shape[1:] for spec in signature.inputs)
        if not inside and _sizes(signature, tensors)[str(leading)] == 1:
            tensors = tuple(
                torch.cat([tensor, tensor]) if spec.shape[:1] == (leading,) else tensor
                for spec, tensor in zip(signature.inputs, tensors, strict=True)
            )
    return tensors


def _export(source: Source, example: tuple[Tensor, ...], exporter: Exporter) -> tuple[ir.Model, dict[str, Any]]:
    routes: dict[str, Callable[[Source, tuple[Tensor, ...]], ir.Model]]
    routes = {"torchscript": _by_trace, "dynamo": _by_dynamo}
    chosen = list(routes) if exporter == "auto" else [exporter]
    failures: list[str] = []
    fix = ("rewrite the named operation in forward() with tensor operations, or choose a target that takes the live "
           "module (`deploytool targets list`)")  # fmt: skip
    for name in chosen:
        try:
            with _unfused(source.flat):
                model = routes[name](source, example)
        except Exception as error:  # torch's exporters raise every kind of exception for what they do not know
            failures.append(f"{name}: {reason(error)}")
            fix = DATA_DEPENDENT if depends_on_data(error) else fix
            continue
        why = f"after {failures[0]}" if failures else "first choice" if exporter == "auto" else "asked for"
        return model, {"exporter": name, "why": why, "opset": OPSET}
    raise InputRefused(
        "DT305", f"the model must be exportable to ONNX by torch (got a failure from {' and '.join(chosen)})",
        detail=failures, fix=fix,
    )  # fmt: skip


@contextlib.contextmanager
def _unfused(module: nn.Module) -> Iterator[None]:
    """Inside the block torch's fused attention is plain: the exporters take sizes inside it for constants."""
    fused = {name: module.get_submodule(name) for name in fused_names(module)}
    unfuse(module)
    try:
        yield
    finally:
        for name, original in fused.items():
            parent, _, child = name.rpartition(".")
            module.get_submodule(parent).register_module(child, original)


def _by_trace(source: Source, example: tuple[Tensor, ...]) -> ir.Model:
    model = trace(source, example, OPSET)
    for value in model.graph.outputs:
        value.shape = None  # torch writes what it saw; the graph's own shapes tell whether a dimension was frozen
    fold(model)
    _refuse_frozen(source.signature, model.graph)
    _declare(source.signature, model.graph)
    return tidy(model)


def _by_dynamo(source: Source, example: tuple[Tensor, ...]) -> ir.Model:
    from deploytool.lower.onnx_dynamo import export_dynamo

    model = export_dynamo(source, example, OPSET)
    _declare(source.signature, model.graph)
    return model


def _refuse_frozen(signature: Signature, graph: ir.Graph) -> None:
    for spec, value in zip(signature.outputs, graph.outputs, strict=True):
        if value.shape is None or len(value.shape) != len(spec.shape):
            continue
        frozen = [d for d, got in zip(spec.shape, value.shape, strict=True)
                  if isinstance(d, str) and isinstance(got, int)]  # fmt: skip
        if frozen:
            raise ValueError(f"the trace fixed dimension {frozen[0]!r} of output {spec.name!r} "
                             f"to {value.shape[spec.shape.index(frozen[0])]}")  # fmt: skip


def _declare(signature: Signature, graph: ir.Graph) -> None:
    """Give inputs and outputs exactly the names, types and dimensions of the signature."""
    for specs, values in ((signature.inputs, graph.inputs), (signature.outputs, graph.outputs)):
        if [v.name for v in values] != [s.name for s in specs]:
            raise ValueError(f"the graph must have {[s.name for s in specs]} (got {[v.name for v in values]})")
        for spec, value in zip(specs, values, strict=True):
            _declare_one(spec, value)


def _declare_one(spec: TensorSpec, value: ir.Value) -> None:
    dtype = ir.DataType.from_numpy(np.dtype(spec.dtype))
    if value.dtype is not None and value.dtype != dtype:
        raise ValueError(f"{spec.name!r} must be {spec.dtype} (got {value.dtype})")
    value.type = ir.TensorType(dtype)
    value.shape = ir.Shape(spec.shape)

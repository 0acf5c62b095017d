"""Lowers a module to an ExecuTorch program: torch.export with bounded sizes, partitions for XNNPACK, one flat file.

Attention is written in products, a sum and a softmax, which XNNPACK takes; torch's own way guards against rows without
any key in operators that it does not take, which cut every layer into pieces.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from deploytool.backends import tables
from deploytool.backends.base import Request, source_of
from deploytool.backends.eager import positional
from deploytool.backends.exported import export_module, quiet
from deploytool.errors import DeployError, InputRefused, UsageProblem, nearest
from deploytool.load.flat import no_fast_path
from deploytool.signature import Outputs, Signature

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its parts warn of each other while they are imported
    import executorch.kernels.quantized  # noqa: F401 - registers the rounding that XNNPACK leaves to others
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackDynamicallyQuantizedPartitioner,
        XnnpackPartitioner,
    )
    from executorch.backends.xnnpack.utils.configs import get_transform_passes
    from executorch.exir import EdgeProgramManager, ExecutorchProgramManager, to_edge_transform_and_lower

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
_METHOD = "forward"


@dataclass(frozen=True)
class Lowered:
    """What a program needs of the runtime that loads it.

    backends    such as "XnnpackBackend"
    operators   of ExecuTorch's own kernels, such as "aten::mean.out"
    nodes       names of the nodes that call each operator
    """

    backends: list[str]
    operators: list[str]
    nodes: Mapping[str, list[str]]


def sizes_of(request: Request, options: tables.ExecuTorchBuild) -> dict[str, int]:
    """The largest size of every free dimension: of calibration feeds and parity cases, or what the profile says.

    Raises UsageProblem for a profile that leaves one of these outside.
    """
    signature = request.signature
    if unknown := [name for name in options.largest if name not in signature.free]:
        raise UsageProblem("DT202", f"build.largest must name free dimensions (got {', '.join(unknown)})",
                           detail=[nearest(name, signature.free) for name in unknown])  # fmt: skip
    found = dict.fromkeys(signature.free, 0)
    for feeds in _feeds(request) if found else ():
        for dim, size in signature.bind(feeds).items():
            found[dim] = max(found[dim], size)
    if small := {dim: found[dim] for dim, most in options.largest.items() if most < found[dim]}:
        said = ", ".join(f"{dim} {options.largest[dim]}, with samples of {size}" for dim, size in small.items())
        raise UsageProblem("DT202", f"build.largest must hold the sizes of every sample (got {said})",
                           fix="make it larger, or give samples of the sizes that the program is for")  # fmt: skip
    return {**found, **options.largest}


def _feeds(request: Request) -> Iterable[Outputs]:
    yield from request.cases()
    yield from request.calibration()


def example(request: Request) -> tuple[Tensor, ...]:
    """The smallest of the feeds with the most free dimensions larger than 1, which torch.export would fix."""
    ranked = [(-sum(size > 1 for size in request.signature.bind(feeds).values()),
               sum(array.size for array in feeds.values()), index) for index, feeds in enumerate(_feeds(request))]
    if not ranked:
        raise InputRefused("DT303", "exporting must have at least one sample (got none)")
    chosen = min(ranked)[2]
    feeds = next(feeds for index, feeds in enumerate(_feeds(request)) if index == chosen)
    return tuple(tensor.clone() for tensor in positional(request.signature, feeds))


def lower(
    request: Request, options: tables.ExecuTorchBuild, largest: Mapping[str, int], path: Path
) -> tuple[Lowered, dict[str, Any]]:
    """Write the program of a request to `path`; tells what it needs and what was done.

    Raises InputRefused where torch or ExecuTorch refuses the model.
    """
    source = source_of(request)
    arguments = example(request)
    # torch's choice between its own convolutions depends on sizes, which would become bounds.
    with quiet(), torch.backends.mkldnn.flags(enabled=False), torch.backends.nnpack.flags(enabled=False):
        program = export_module(source.flat, request.signature, arguments, largest)
        done: dict[str, Any] = {}
        if request.target.precision == "int8":
            from deploytool.backends.executorch_int8 import quantize

            program, done = quantize(program, request, options, largest)
        _check_bounds(program, request.signature, largest)
        try:
            with torch.no_grad(), no_fast_path():
                return _write(_partitioned(program), path), done
        except (DeployError, OSError):
            raise
        except Exception as error:  # what the compiler raises has no common base
            raise InputRefused("DT310", "ExecuTorch must lower the exported program "
                                        f"(got {type(error).__name__}: {error})"[:2000],
                               fix="replace what is named in the model, or choose another target") from error


def _check_bounds(program: ExportedProgram, signature: Signature, largest: Mapping[str, int]) -> None:
    """Refuse a model whose own code takes less than the sizes that are asked for: torch then narrows the bounds."""
    inputs = [node for node in program.graph.nodes if node.op == "placeholder"][-len(signature.inputs) :]
    for spec, node in zip(signature.inputs, inputs, strict=True):
        for dim, size in zip(spec.shape, node.meta["val"].shape, strict=True):
            if isinstance(size, int):
                continue
            upper = program.range_constraints[size.node.expr].upper
            if isinstance(dim, str) and upper < max(largest[dim], 2):
                raise InputRefused("DT310", f"the model must take {dim} up to {largest[dim]} (it takes {upper})",
                                   fix=f"set {dim} = {upper} in [build.largest] and give no larger samples")


def _partitioned(program: ExportedProgram) -> EdgeProgramManager:
    """The program with what XNNPACK takes in partitions of its own.

    They are as large as can be; where two of these would wait for each other, which ExecuTorch 1.5 does not see in
    time with ranges that are taken on every call, each layer with such ranges gets one by itself.
    """
    try:
        return _edge(program, XnnpackPartitioner())
    except AssertionError as error:
        if "dependency cycles" not in str(error):
            raise
    return _edge(program, XnnpackDynamicallyQuantizedPartitioner(), XnnpackPartitioner())


def _edge(program: ExportedProgram, *partitioners: Any) -> EdgeProgramManager:
    plain = program.run_decompositions({_ATTENTION: attention})
    return to_edge_transform_and_lower(plain, transform_passes=get_transform_passes(), partitioner=[*partitioners])


def _write(edge: EdgeProgramManager, path: Path) -> Lowered:
    made: ExecutorchProgramManager = edge.to_executorch()
    with path.open("wb") as file:
        made.write_to_file(file)  # piece by piece: its bytes in one would be the weights once more
    plan = made.executorch_program.execution_plan[0]
    nodes: dict[str, list[str]] = {}
    for node in made.exported_program(_METHOD).graph.nodes:
        nodes.setdefault(_name(node.target), []).append(node.name)
    operators = sorted({f"{op.name}.{op.overload}" if op.overload else op.name for op in plan.operators})
    return Lowered(sorted({delegate.id for delegate in plan.delegates}), operators, nodes)


def _name(target: Any) -> str:
    """An operator as the runtime calls it: "aten::mean.out"."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return str(target)
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else str(schema.name)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, dropout: float = 0.0, causal: bool = False,
    *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(query @ key^T * scale + mask) @ value; tensors [..., length, size], as in torch's documentation.

    A bool mask is True where a key is seen; a query that sees none gives zeros, as torch's does.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = (tensor.repeat_interleave(groups, -3) for tensor in (key, value))
    if causal:
        queries, keys = torch.arange(query.shape[-2]), torch.arange(key.shape[-2])
        mask = queries[:, None] >= keys[None, :]
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if mask is None:
        return scores.softmax(-1) @ value
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1) @ value
    seen = mask.any(-1, keepdim=True).to(query.dtype)
    hidden = torch.where(mask, 0.0, torch.finfo(query.dtype).min)
    return (scores + hidden).softmax(-1) @ value * seen

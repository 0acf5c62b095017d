"""What ONNX Runtime gets instead of the portable graph: a fused decoder, and weights in 4 or 8 bits."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploytool.artifact import Artifact
from deploytool.backends import ort_blocks, tables
from deploytool.backends.base import Request
from deploytool.backends.ort_decoder import fuse_decoder
from deploytool.backends.ort_groups import Grouped, grouped_from
from deploytool.backends.ort_importance import mean_squares
from deploytool.backends.ort_weights import Plan, Product, compress_weights, embedded, products, rounded_matrix
from deploytool.encoding import read_coded
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.lower.onnx_write import save

MICROSOFT = "com.microsoft"
# What a runner must know of a fused decoder: the operator takes several rows or several tokens, not both.
_SINGLE_ROWS = {"rows": "single"}


def write_plain(portable: Artifact, out: Path) -> dict[str, Any] | None:
    """Write the fused graph in fp32; None, and nothing written, where there is nothing to fuse."""
    model = _loaded(portable)
    fused = fuse_decoder(model)
    if not fused:
        return None
    save(model, out)
    return {"fused": fused, **_SINGLE_ROWS}


def write_weight_only(portable: Artifact, request: Request, options: tables.OnnxRuntimeBuild) -> dict[str, Any]:
    """Write the graph with rounded weights; products are computed from them without a float copy.

    InputRefused DT310 when no product has constant weights.
    """
    model, fused = _fused(portable, options)
    bits = 4 if request.target.precision == "int4" else 8
    given, refused = _encoded(model, request)
    inputs = mean_squares(model, request) if bits == 4 and not given else {}
    known = _Known(8 if given else bits, given, inputs)
    told = {}
    if ort_blocks.wanted(options):
        told = {"measured": _measured(portable, request, options, known)}
        options = options.model_copy(update=told["measured"]["taken"])
    stored, plans = _rewritten(model, options, known, request.out)
    encoded = {"encoded": len(given), "encodings_not_taken": refused} if request.encodings else {}
    return {**({"fused": fused, **_SINGLE_ROWS} if fused else {}), **_told(stored, plans), **encoded, **told}


@dataclass(frozen=True)
class _Known:
    """What every way to store the weights starts from.

    bits     of the matrices that are not `given`
    given    those that the model's own encodings hold
    inputs   mean squares of the inputs of products, where ranges are chosen by them
    """

    bits: int
    given: dict[str, Grouped]
    inputs: dict[str, Any]


def _measured(
    portable: Artifact, request: Request, options: tables.OnnxRuntimeBuild, known: _Known
) -> dict[str, Any]:
    """What the candidates for groups and activations cost and lose; see `ort_blocks.measured_blocks`."""

    def write(candidate: ort_blocks.Candidate, out: Path) -> None:
        chosen = {"group": candidate.group, "activations": candidate.activations}
        _rewritten(_fused(portable, options)[0], options.model_copy(update=chosen), known, out)

    single_rows = bool(_fused(portable, options)[1])
    return ort_blocks.measured_blocks(request, options, write, single_rows=single_rows)


def _fused(portable: Artifact, options: tables.OnnxRuntimeBuild) -> tuple[ir.Model, dict[str, int]]:
    model = _loaded(portable)
    return model, fuse_decoder(model) if options.fuse else {}


def _rewritten(
    model: ir.Model, options: tables.OnnxRuntimeBuild, known: _Known, out: Path
) -> tuple[dict[str, Grouped], dict[str, Plan]]:
    """Round the weights of `model` in place and write it to `out`; the matrices and their plans, by name."""
    plans = _plans(model, options, known.bits, known.inputs)
    plans |= {name: Plan(matrix.bits, matrix.group, options.activations) for name, matrix in known.given.items()
              if name in plans}  # fmt: skip
    if not plans:
        raise InputRefused("DT310", "the graph must hold matrix products with constant weights (got none)",
                           fix="choose an fp32 target, or openvino-int8, which takes convolutions too")  # fmt: skip
    stored = compress_weights(model, plans, known.inputs, known.given)
    passes.RemoveUnusedNodesPass()(model)
    model.opset_imports[MICROSOFT] = 1
    save(model, out)
    return stored, plans


def _encoded(model: ir.Model, request: Request) -> tuple[dict[str, Grouped], dict[str, str]]:
    """The matrices that the model's own encodings give, by name, and why others of them could not be taken.

    The name of joined products is those of their weights with "+" between them.
    """
    if request.encodings is None:
        return {}, {}
    coded = read_coded(request.encodings)
    taken: dict[str, Grouped] = {}
    refused: dict[str, str] = {}
    for product in (*products(model.graph), *embedded(model.graph)):
        parts = [coded.get(name) for name in product.name.split("+")]
        if not any(parts):
            continue
        matrix, why = grouped_from(parts)
        if matrix is None:
            refused[product.name] = why
        else:
            taken[product.name] = matrix
    return taken, refused


def _loaded(portable: Artifact) -> ir.Model:
    """The graph with its weights mapped from their file, as tensors that may be written anywhere."""
    model = ir.load(portable.main_file)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy(), name=tensor.name)
    return model


def _plans(model: ir.Model, options: tables.OnnxRuntimeBuild, bits: int, inputs: dict[str, Any]) -> dict[str, Plan]:
    """How each matrix is stored, by name; those that `exclude` names stay fp32, and it must name some."""
    there = {p.name: p for p in (*embedded(model.graph), *products(model.graph))}
    idle = [pattern for pattern in options.exclude if not any(fnmatchcase(name, pattern) for name in there)]
    if idle:
        raise UsageProblem("DT202", f"build.exclude must hold patterns of weights' names (got {', '.join(idle)})",
                           detail=[nearest(idle[0], there)])  # fmt: skip
    found = {name: p for name, p in there.items() if not any(fnmatchcase(name, one) for one in options.exclude)}
    plans = {name: Plan(bits, _group(p, int(options.group)), options.activations) for name, p in found.items()}
    for name in _eight_bits(found, plans, options.int8_share, inputs) if bits == 4 else ():
        plans[name] = Plan(8, plans[name].group, options.activations)
    return plans


def _group(product: Product, wanted: int) -> int:
    """The wanted group, or the largest smaller one that divides the row: an embedding's rows cannot be filled up."""
    columns = product.columns
    return next((size for size in (wanted, 128, 64, 32, 16) if size <= wanted and columns % size == 0), wanted)


def _eight_bits(found: dict[str, Product], plans: dict[str, Plan], share: float, inputs: dict[str, Any]) -> list[str]:
    """The matrices that lose most from 4 bits for each byte that 8 would cost, up to `share` of all weights.

    Those that make the outputs come first: nothing after them evens their errors out.
    """
    budget = share * sum(p.size for p in found.values())
    if not budget:
        return []
    loss = {}
    for name, product in found.items():
        exact = product.rows()
        off = rounded_matrix(product, plans[name], inputs.get(name)).values(exact.shape[1]) - exact
        counts = inputs.get(name, 1.0)
        loss[name] = float((off * off * counts).sum() / max((exact * exact * counts).sum(), 1e-30)) / product.size
    chosen: list[str] = []
    last = {name for name, product in found.items() if product.node.outputs[0].is_graph_output()}
    for name in sorted(loss, key=lambda n: (n not in last, -loss[n], n)):
        if found[name].size <= budget:
            chosen.append(name)
            budget -= found[name].size
    return chosen


def _told(stored: dict[str, Grouped], plans: dict[str, Plan]) -> dict[str, Any]:
    """What the artifact says of its weights: how many matrices of each kind, and the bytes that one token reads."""
    kinds = [f"int{m.bits} group {m.group}" for m in stored.values()]
    return {
        "weights": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
        "weight_bytes_per_token": sum(m.nbytes for name, m in stored.items()),
        "int8_weights": sorted(name for name, plan in plans.items() if plan.bits == 8),
    }

"""int8 for XNNPACK: an exported program rounded by torchao's PT2E as XNNPACK's own kernels round.

Weights have 8 bits per output channel, activations 8 bits per tensor. XNNPACK adds products in 32 bits, so nothing
saturates on any CPU. Inputs of linears are rounded in ranges taken on every call, which transformers need (MiniLM's
cosine 0.999, and 0.96 with ranges fixed by calibration); convolutional networks run as one piece in whole numbers when
all ranges are fixed. Which of both is taken is measured. Grids that a model has learned are static ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch.export import ExportedProgram
from torch.fx import Node

from deploytool.backends import pt2e, sensitivity, tables
from deploytool.backends.base import Request, source_of
from deploytool.backends.exported import quiet
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.signature import Feeds, Signature

with quiet():  # its parts warn of each other while they are imported
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        CONV_TARGETS,
        CONV_TRANSPOSE_TARGETS,
        LINEAR_TARGETS,
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )

_CONVOLUTIONS = frozenset(CONV_TARGETS | CONV_TRANSPOSE_TARGETS)
_LINEARS = frozenset(LINEAR_TARGETS)
_GOOD_ENOUGH_SHARE = 0.5  # of the profile's allowed loss of cosine: a scheme that stays within ends the search


def quantize(
    program: ExportedProgram, request: Request, options: tables.ExecuTorchBuild, largest: Mapping[str, int]
) -> tuple[ExportedProgram, dict[str, Any]]:
    """The rounded program and what was done; raises InputRefused where nothing became int8."""
    layers = _layers(program)
    _check_names(options.exclude, layers)
    feeds = sensitivity.spread(request.calibration(), options.calibration_samples)
    reference = _outputs(program, request.signature, feeds)
    encodings = source_of(request).encodings
    best: tuple[float, str, pt2e.Quantized] | None = None
    for scheme in ["learned"] if pt2e.layers_with_grids(program) else _schemes(options, layers):
        quantized = pt2e.quantize(program, _quantizer(scheme, options.exclude), feeds, request.signature, encodings,
                                  largest)  # fmt: skip
        loss = sensitivity.output_loss(reference, _outputs(quantized.program, request.signature, feeds))
        if best is None or loss < best[0]:
            best = (loss, scheme, quantized)
        if loss <= _GOOD_ENOUGH_SHARE * (1.0 - request.target.parity.cosine_min):
            break
    assert best is not None  # there is at least one scheme
    loss, scheme, quantized = best
    done = _rounded(quantized.program)
    if not done:
        raise InputRefused("DT310", "the model must hold linear layers or convolutions that can become int8 (got none)",
                           fix="choose an fp32 target")  # fmt: skip
    learned = quantized.learned
    settings: dict[str, Any] = {"scheme": scheme, "calibration_feeds": len(feeds), "int8": dict(done),
                                "kept_fp32": list(options.exclude), "weight_bits": 8, "loss": loss}  # fmt: skip
    if encodings:
        settings |= {"encoded": len(learned.weights), "encodings_not_taken": learned.not_taken}
    return quantized.program, settings


def _schemes(options: tables.ExecuTorchBuild, layers: Mapping[str, str]) -> list[str]:
    """The schemes to try, the likelier first."""
    if options.scheme != "auto":
        return [options.scheme]
    kinds = Counter(layers.values())
    return ["static", "dynamic"] if kinds["conv"] > kinds["linear"] else ["dynamic", "static"]


def _quantizer(scheme: str, exclude: tuple[str, ...]) -> XNNPACKQuantizer:
    static = get_symmetric_quantization_config(is_per_channel=True)
    dynamic = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=True)
    quantizer = XNNPACKQuantizer().set_filter_function(lambda node: pt2e.layer_of(node) not in exclude)
    if scheme == "static":
        return quantizer.set_global(static)
    for kind in _LINEARS:
        quantizer.set_operator_type(kind, static if scheme == "learned" else dynamic)
    for kind in _CONVOLUTIONS:
        quantizer.set_operator_type(kind, static)
    return quantizer


def _layers(program: ExportedProgram) -> dict[str, str]:
    """Layers that can become int8, by their own names, and whether each is "linear" or "conv"."""
    with quiet():
        nodes = program.module(check_guards=False).graph.nodes
    return {pt2e.layer_of(node): _kind(node) for node in nodes if _kind(node) and pt2e.layer_of(node)}


def _kind(node: Node) -> str:
    return "conv" if node.target in _CONVOLUTIONS else "linear" if node.target in _LINEARS else ""


def _rounded(program: ExportedProgram) -> Counter[str]:
    """How many layers of each kind read a rounded weight and a rounded input."""
    return Counter(_kind(node) for node in program.graph.nodes
                   if _kind(node) and all(_is_rounded(given) for given in node.args[:2]))  # fmt: skip


def _is_rounded(node: Any) -> bool:
    return isinstance(node, Node) and "dequantize" in str(node.target)


def _check_names(names: tuple[str, ...], layers: Mapping[str, str]) -> None:
    if unknown := [name for name in names if name not in layers]:
        raise UsageProblem("DT202", f"build.exclude must name linear layers or convolutions (got {', '.join(unknown)})",
                           detail=[nearest(name, layers) for name in unknown[:5]])  # fmt: skip


def _outputs(program: ExportedProgram, signature: Signature, feeds: list[Feeds]) -> list[np.ndarray]:
    with quiet():
        module = program.module(check_guards=False)
    return [output.numpy() for one in feeds for output in pt2e.run_module(module, signature, one)]

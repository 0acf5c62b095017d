"""The graph that TensorRT is given: its networks are strongly typed, so the precision of an engine is written into it.

    fp32, fp16, bf16   the portable graph in that type; sums and norms stay fp32 in the latter two
    int8, fp8          Q/DQ pairs at weights and activations, around zero
    int4               DequantizeLinear at weights, in blocks; activations stay as they are

What lies between the grids of the last three is in the profile's `rest`. Where ONNX Runtime has no kernels for a type,
a second graph (`parity.onnx`) computes the same in fp32 with every 16-bit tensor rounded: see onnx_rounded.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx

from deploytool.artifact import Artifact
from deploytool.backends import sensitivity, tables
from deploytool.backends.base import Request
from deploytool.backends.onnx_fp16 import refuse_grids, write_bf16, write_fp16
from deploytool.backends.onnx_gptq import grams
from deploytool.backends.onnx_learned import write_learned
from deploytool.backends.onnx_opset import raise_opset
from deploytool.backends.onnx_products import with_products
from deploytool.backends.onnx_qdq import Scheme, quantizable
from deploytool.backends.onnx_rounded import in_floats
from deploytool.backends.onnx_schemes import Fp8, Int4
from deploytool.backends.onnx_static import WITHOUT, Options, quantize_static
from deploytool.backends.onnxruntime import copy_graph
from deploytool.errors import UsageProblem

GRAPH = "model.onnx"
PARITY = "parity.onnx"
_KINDS: dict[str, int]
_KINDS = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
_FEEDS = 8  # calibration feeds on which fp16 is checked for overflow
_INLINE = 1024  # bytes: smaller constants stay in the graph, since shapes are read from them


def write_graph(portable: Artifact, request: Request, options: tables.TensorRtBuild) -> dict[str, Any]:
    """Write `model.onnx` in the profile's precision, and `parity.onnx` where that cannot run here; what was done."""
    precision, out = request.target.precision, request.out / GRAPH
    if precision == "fp32":
        copy_graph(portable, request.out)
        return {}
    if precision in ("fp16", "bf16"):
        return _write_rest(portable, portable.main_file, request, options, precision)
    if precision == "int8" and "input_grids" in portable.settings:
        # Between learned grids 16 bits would move numbers to other codes.
        return {**write_learned(portable, request, "tensorrt"), "rest": "fp32, as the model has learned grids"}
    if precision not in ("int8", "fp8", "int4"):
        raise UsageProblem("DT202", f"precision must be one that TensorRT has (got {precision})")
    if "input_grids" in portable.settings:
        refuse_grids(portable, "TensorRT")
    op_types = ("MatMul",) if precision == "int4" else ("MatMul", "Conv")
    static = Options(options, op_types, options.calibration, options.calibration_samples,
                     _scheme(portable.main_file, request, options))  # fmt: skip
    done = quantize_static(portable.main_file, request, static, out)
    if options.rest == "fp32":
        return {**done, "rest": "fp32", "fuse_qdq": False, "without": list(WITHOUT)}
    return done | _write_rest(portable, out, request, options, options.rest)


def _scheme(source: Path, request: Request, options: tables.TensorRtBuild) -> Scheme:
    scales = _KINDS[options.rest]
    if request.target.precision == "int8":
        return Scheme(8, symmetric=True, scales=scales)
    if request.target.precision == "fp8":
        return Fp8(scales=scales)
    model = with_products(raise_opset(onnx.load(source), Int4.opset))
    feeds = sensitivity.spread(request.calibration(), options.calibration_samples)
    return Int4(grams=grams(model, quantizable(model, ("MatMul",)), feeds), group=options.group, scales=scales)


def _write_rest(
    portable: Artifact, source: Path, request: Request, options: tables.TensorRtBuild, kind: str
) -> dict[str, Any]:
    """The graph at `source` with its floats in `kind`; refuses learned grids, which 16 bits would move."""
    refuse_grids(portable, "TensorRT")
    out = request.out / GRAPH
    if source == out:  # Q/DQ pairs have 16-bit scales from operator set 19 on
        onnx.save(raise_opset(onnx.load(source), 19), out)
    if kind == "fp16":
        feeds = sensitivity.spread(request.calibration(), _FEEDS)
        done = write_fp16(source, feeds, options.fp32_ops, out)
    else:
        done = write_bf16(source, options.fp32_ops, out)
    if request.target.precision == "fp16":
        return {**done, "parity_run": "the very graph that the compiler was given, every fp16 tensor rounded"}
    _write_parity(request.out)
    rest = {"rest": kind} if kind != request.target.precision else {}
    return {**done, **rest, "fuse_qdq": False, "without": list(WITHOUT), "parity_graph": PARITY,
            "parity_run": f"the graph that the compiler was given with its products in fp32 ({PARITY}): every tensor "
            f"that it holds in {kind} is rounded to it, since CPUs have no such products"}  # fmt: skip


def _write_parity(out: Path) -> None:
    """The graph that runs on a CPU, beside the one that the compiler is given; both read one file of weights."""
    data = f"{GRAPH}.data"
    model = onnx.load(out / GRAPH)
    (out / GRAPH).unlink()
    onnx.save(model, out / GRAPH, save_as_external_data=True, location=data, size_threshold=_INLINE)
    onnx.save(in_floats(onnx.load(out / GRAPH, load_external_data=False)), out / PARITY)

"""Dynamic int8 of an ONNX graph with ONNX Runtime's quantizer.

Weights get 7 bits per output channel by default where products of 8-bit weights could saturate silently in the AVX2
kernels of CPUs without VNNI (saturation.py), and matrix products where they could not get 8. The products that cost
most on the calibration feeds stay fp32 (onnx_products.py).
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto, numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX, add_pre_process_metadata

from deploytool.backends import ort_mixed, saturation, sensitivity, tables
from deploytool.backends.base import Request
from deploytool.backends.measured import MEASURED, opened_with
from deploytool.backends.onnx_products import (
    all_effects,
    constant_products,
    dynamic_rounding,
    products_to_keep,
    with_products,
)
from deploytool.backends.onnx_qdq import Scheme
from deploytool.backends.ort_generate import session_options
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.signature import Feeds

_INT8_OPS = ("MatMulInteger", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "ConvInteger", "Gather")
_LARGEST_BYTES = 1_900_000_000  # a file of one piece must stay below 2 GB
_COLUMNS = 64  # looked at together
_HELD = 32  # calibration feeds that the loss is taken on where products are given back by it


def quantize(source: Path, request: Request, options: tables.OnnxRuntimeBuild, out: Path) -> dict[str, Any]:
    """Write the int8 graph to `out` and return what was done; raises InputRefused when nothing became int8."""
    model = with_products(onnx.load(source))
    add_pre_process_metadata(model)  # else the quantizer asks for a preparation that fails on transformers
    _check_names(model, options)
    bits = 7 if options.reduce_range else 8
    whole = _whole_bits(model) if options.reduce_range else []
    kept, told = [*options.exclude], {}
    if options.mixed == MEASURED and "MatMul" in options.int8_ops and constant_products(model, options):
        told = {"measured": _weighed(model, request, options, bits, whole)}
        kept += ort_mixed.kept(told["measured"])
    elif "MatMul" in options.int8_ops:
        kept += products_to_keep(model, request, options, bits, whole)
    written = _written(model, options, kept, whole, out)
    done = _int8_nodes(written)
    if not done and told:
        raise ort_mixed.nothing_left(told["measured"])
    if not done:
        there = ", ".join(sorted({node.op_type for node in model.graph.node}))
        raise InputRefused(
            "DT310", f"the graph must hold operators that become dynamic int8: {', '.join(options.int8_ops)} with "
            f"constant weights (got {there})",
            fix="choose an fp32 target, or one with static int8: openvino-int8",
        )  # fmt: skip
    weights = list(_weights(written))
    in_8 = sorted({name.removesuffix(TENSOR_NAME_QUANT_SUFFIX) for name, *_ in weights}.intersection(whole))
    return {"int8": done, "kept_fp32": kept, "weight_bits": bits, "weights_in_8_bits": in_8,
            "can_saturate": saturation.counted(weights), **told}  # fmt: skip


def _written(
    model: ModelProto, options: tables.OnnxRuntimeBuild, kept: Sequence[str], whole: Sequence[str], out: Path
) -> ModelProto:
    """The graph with all in int8 but for the nodes `kept`, written to `out`; weights named in `whole` have 8 bits."""
    quantize_dynamic(
        model, out, weight_type=QuantType.QInt8, per_channel=True, reduce_range=options.reduce_range,
        op_types_to_quantize=list(options.int8_ops), nodes_to_exclude=list(kept),
        use_external_data_format=model.ByteSize() > _LARGEST_BYTES,
        # Operators of com.microsoft have no shape inference; without a default the quantizer stops at their weights.
        extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True,
                       "TensorQuantOverrides": {name: [{"axis": 1, "reduce_range": False}] for name in whole}},
    )  # fmt: skip
    return onnx.load(out)


def _weighed(
    model: ModelProto, request: Request, options: tables.OnnxRuntimeBuild, bits: int, whole: Sequence[str]
) -> dict[str, Any]:
    """What the matrix products gain and cost; see `ort_mixed.weighed`."""
    products = constant_products(model, options)
    settings = opened_with(request, options)
    held = sensitivity.spread(request.calibration(), _HELD)
    exact: list[list[np.ndarray]] = []

    def rounded(kept: Sequence[str] = ()) -> ModelProto:
        with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
            return _written(model, options, [*options.exclude, *kept], whole, Path(folder) / "model.onnx")

    def loss(kept: Sequence[str]) -> float:
        exact[:] = exact or _outputs(model, held, settings)
        return max(map(sensitivity.sample_loss, exact, _outputs(rounded(kept), held, settings)))

    def effects(names: Sequence[str]) -> Mapping[str, float]:
        chosen = [node for node in products if node.name in names]
        return all_effects(model, chosen, dynamic_rounding(model, chosen, bits, whole), request, options)

    timed = sensitivity.spread(request.calibration(), options.samples)
    return ort_mixed.weighed(request, ort_mixed.Choice(model, products, rounded, effects, loss, timed, settings))


def _outputs(model: ModelProto, feeds: Sequence[Feeds], settings: Mapping[str, Any]) -> list[list[np.ndarray]]:
    session = ort.InferenceSession(model.SerializeToString(), session_options(settings),
                                   providers=["CPUExecutionProvider"], disabled_optimizers=settings["without"])
    return [session.run(None, dict(one)) for one in feeds]


def _whole_bits(model: ModelProto) -> list[str]:
    """Names of the weights of matrix products that cannot saturate in 8 bits."""
    tensors = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) == 2}
    others = {name for n in model.graph.node for i, name in enumerate(n.input) if (n.op_type, i) != ("MatMul", 1)}
    names = sorted({n.input[1] for n in model.graph.node if n.op_type == "MatMul"}.intersection(tensors) - others)
    return [name for name in names if _fits(numpy_helper.to_array(tensors[name]))]


def _fits(weight: np.ndarray) -> bool:
    """Whether no product with this weight [in, out] can saturate in 8 bits; most are seen to in the first columns."""
    parts = (weight[:, start : start + _COLUMNS] for start in range(0, weight.shape[1], _COLUMNS))
    return not any(saturation.pair_sums(Scheme(8).codes(part, 1)[0], 1).can_saturate for part in parts)


def _weights(model: ModelProto) -> Iterator[tuple[str, np.ndarray, int]]:
    """Name, codes and the axis that counts outputs of every int8 weight of a product."""
    tensors = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    places = {name: node.op_type for node in model.graph.node for name in node.input[1:3]
              if node.op_type in _INT8_OPS and node.op_type != "Gather" and name in tensors}  # fmt: skip
    for name, kind in places.items():
        codes = numpy_helper.to_array(tensors[name])
        if kind == "DynamicQuantizeLSTM":  # [directions, in, gates]
            yield name, codes.transpose(0, 2, 1).reshape(-1, codes.shape[1]), 0
        elif codes.ndim > 1:  # not a zero point
            yield name, codes, 0 if kind == "ConvInteger" else codes.ndim - 1


def _check_names(model: ModelProto, options: tables.OnnxRuntimeBuild) -> None:
    names = [node.name for node in model.graph.node]
    unknown = [name for name in options.exclude if name not in names]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name nodes of the graph (got {', '.join(unknown)})",
                           detail=[nearest(name, names) for name in unknown[:5]])  # fmt: skip


def _int8_nodes(model: ModelProto) -> dict[str, int]:
    """How many nodes of each kind compute on int8 constants."""
    constants = {t.name for t in model.graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.UINT8)}
    return dict(Counter(n.op_type for n in model.graph.node
                        if n.op_type in _INT8_OPS and constants.intersection(n.input)))  # fmt: skip

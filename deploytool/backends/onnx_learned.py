"""A graph of a model that was trained on grids, as int8: its own scales for inputs and weights, chosen by no quantizer.

The portable graph has the inputs of layers on their grids already. Here the weights become int8 codes with a scale per
output channel behind a DequantizeLinear, so that an engine finds products of two quantized tensors, which it computes
in int8. Operators: https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html, onnx__DequantizeLinear.html and
onnx__ConvInteger.html.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as passes

from deploytool.artifact import Artifact
from deploytool.backends.base import Request, find_backend
from deploytool.backends.onnx_edit import Maker, constant, made_by, scalar
from deploytool.backends.used_settings import unused_beside_grids
from deploytool.encoding import Coded, read_coded
from deploytool.errors import InputRefused
from deploytool.lower.onnx_write import save

_PRODUCTS = ("MatMul", "Gemm", "Conv")
_PASSES_CODES = ("Relu", "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze")


def write_learned(portable: Artifact, request: Request, engine: str) -> dict[str, Any]:
    """Write the int8 graph as `model.onnx` into the request's folder; returns what was done.

    engine   "onnxruntime": Gemm as MatMul, and convolutions whose result is not quantized as ConvInteger, which it has
             int8 kernels for; "tensorrt": whole numbers have a sign and no zero point; else "openvino"

    InputRefused DT310: no layer could become int8, or a grid is not one that TensorRT takes.
    """
    asked = find_backend(request.target.backend).table(**request.target.build)
    model = ir.load(portable.main_file)
    coded = read_coded(request.encodings) if request.encodings else {}
    done: Counter[str] = Counter()
    refused: dict[str, str] = {}
    bits = 0
    for node in [node for node in model.graph if node.op_type in _PRODUCTS]:
        weight = node.inputs[1]
        if weight is None or weight.name not in coded:
            continue
        why = _obstacle(node, coded[str(weight.name)], engine)
        if why:
            refused[str(weight.name)] = why
            continue
        bits = max(bits, coded[str(weight.name)].bits)
        done[node.op_type] += 1
        _rewrite(model.graph, node, coded[str(weight.name)], engine)
    if not done:
        raise InputRefused("DT310", "the graph must hold layers whose inputs and weights lie on grids (got none that "
                           "int8 engines take)", detail=[f"{name}: {why}" for name, why in refused.items()][:10],
                           fix='choose another target, or set scheme = "dynamic"')  # fmt: skip
    if engine == "tensorrt":
        _drop_zero_points(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    save(model, request.out)
    return {"scheme": "learned", "int8": dict(done), "encoded": done.total(), "encodings_not_taken": refused,
            "weight_bits": bits} | unused_beside_grids(asked)  # fmt: skip


def _obstacle(node: ir.Node, coded: Coded, engine: str) -> str:
    """Why a product cannot be computed from its learned grids; "" where it can."""
    if made_by(node.inputs[0], "DequantizeLinear") is None:
        return "its input is not on a grid"
    if coded.scale.shape[1] > 1:
        return f"int8 products have one scale per output channel (got groups of {coded.group})"
    if (coded.zero_point != np.round(coded.zero_point)).any():
        return "zero points must be whole numbers"
    if engine == "tensorrt" and (coded.zero_point != 2 ** (coded.bits - 1)).any():
        return "TensorRT takes symmetric weights only"
    if node.op_type == "Gemm" and (node.attributes.get_int("transA", 0) == 1 or _is_scaled(node)):
        return "a Gemm with factors, or of a turned input"
    return ""


def _is_scaled(gemm: ir.Node) -> bool:
    return any(gemm.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))


def _rewrite(graph: ir.Graph, node: ir.Node, coded: Coded, engine: str) -> None:
    weight = node.inputs[1]
    assert weight is not None and weight.const_value is not None  # only constants have codes
    array = weight.const_value.numpy()
    codes, zero = _signed(coded)
    axis = 0
    if node.op_type == "Conv":
        codes = codes.reshape(array.shape)
    elif engine == "onnxruntime" or node.op_type == "MatMul" or not node.attributes.get_int("transB", 0):
        codes, axis = np.ascontiguousarray(codes.T), 1
    make = Maker(graph, node)
    name, scale = str(weight.name), coded.scale[:, 0]
    stored = make.constant(codes, f"{name}.codes{axis}")
    if node.op_type == "Conv" and engine == "onnxruntime" and not _result_is_quantized(node) and not zero.any():
        _as_integer(make, node, stored, scale)
        return
    grid = make.constant(scale, f"{name}.scale"), make.constant(zero, f"{name}.zero")
    back = make("DequantizeLinear", [stored, *grid], axis=axis)
    if node.op_type == "Gemm" and engine == "onnxruntime":
        _as_matmul(make, node, back)
    else:
        node.replace_input_with(1, back)


def _signed(coded: Coded) -> tuple[np.ndarray, np.ndarray]:
    """Codes [rows, columns] and zero points [rows]: int8 where the middle code stands for 0, else uint8."""
    middle = 2 ** (coded.bits - 1)
    if (coded.zero_point == middle).all():
        return (coded.codes.astype(np.int16) - middle).astype(np.int8), np.zeros(len(coded.codes), np.int8)
    return coded.codes, coded.zero_point[:, 0].astype(np.uint8)


def _result_is_quantized(node: ir.Node) -> bool:
    """Whether a QuantizeLinear alone reads the result, through nothing that ONNX Runtime cannot move it over.

    A Relu goes into the rounding only where 0 is the first code.
    """
    passed: set[str] = set()
    users = [user for user, _ in node.outputs[0].uses()]
    while len(users) == 1 and users[0].op_type in _PASSES_CODES:
        passed.add(users[0].op_type)
        users = [user for user, _ in users[0].outputs[0].uses()]
    if len(users) != 1 or users[0].op_type != "QuantizeLinear":
        return False
    return "Relu" not in passed or scalar(users[0].inputs[2]) == 0


def _as_matmul(make: Maker, gemm: ir.Node, weight: ir.Value) -> None:
    product = make("MatMul", [gemm.inputs[0], weight])
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    if bias is not None:
        product = make("Add", [product, bias])
    _stand_for(gemm, product)


def _as_integer(make: Maker, conv: ir.Node, codes: ir.Value, scale: np.ndarray) -> None:
    """The convolution of codes in int32, times both scales, plus the bias."""
    turned = made_by(conv.inputs[0], "DequantizeLinear")
    assert turned is not None  # see _obstacle
    known = constant(turned.inputs[1])
    if known is None:
        raise InputRefused("DT310", "the scale of a layer's input must be a constant of the graph (it is computed)")
    shape = [-1] + [1] * (codes.const_value.numpy().ndim - 2)  # type: ignore[union-attr]
    whole = make("ConvInteger", [turned.inputs[0], codes, turned.inputs[2]], **_settings(conv))
    both = (scale * float(known)).astype(np.float32).reshape(shape)
    result = make("Mul", [make("Cast", [whole], to=ir.DataType.FLOAT), make.constant(both)])
    bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else None
    if bias is not None:
        result = make("Add", [result, make.constant(bias.reshape(shape))])
    _stand_for(conv, result)


def _settings(conv: ir.Node) -> dict[str, Any]:
    return {name: attribute.value for name, attribute in conv.attributes.items()}


def _stand_for(old: ir.Node, value: ir.Value) -> None:
    was = old.outputs[0]
    name, value.type, value.shape = was.name, was.type, was.shape
    was.name = f"{name}_unused"
    value.name = name
    was.replace_all_uses_with(value, replace_graph_outputs=True)


def _drop_zero_points(graph: ir.Graph) -> None:
    """Inputs on symmetric grids of uint8 as int8 without a zero point; raises where a grid has another one."""
    wrong = []
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.inputs[2] is None:
            continue
        zero = constant(node.inputs[2])
        if zero is None or zero.dtype != np.uint8:
            continue
        if (zero != 128).any():
            wrong.append(str(node.name))
        node.replace_input_with(2, Maker(graph, node).constant(np.zeros(zero.shape, np.int8)))
    if wrong:
        raise InputRefused("DT310", f"TensorRT must get inputs on symmetric grids (got zero points at {len(wrong)} "
                           "nodes)", detail=sorted(wrong)[:10],
                           fix="train with symmetric_activations = true, or choose another target")  # fmt: skip

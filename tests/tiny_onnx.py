"""Small ONNX files of the kinds that users bring."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

Value = tuple[str, int, Sequence[int | str | None]]
RANDOM = np.random.default_rng(0)


def graph(
    nodes: Sequence[NodeProto], inputs: Sequence[Value], outputs: Sequence[Value], weights: dict[str, np.ndarray],
    *, opset: int = 17, ir_version: int = 8, domain: str = "",
) -> onnx.ModelProto:  # fmt: skip
    """A model of these nodes; before IR version 4 weights are listed as inputs too."""
    tensors = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    listed = [(t.name, t.data_type, list(t.dims)) for t in tensors] if ir_version < 4 else []
    made = helper.make_graph(nodes, "g", [*map(_value, inputs), *map(_value, listed)], [*map(_value, outputs)], tensors)
    sets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(made, opset_imports=sets, ir_version=ir_version)


def _value(value: Value) -> ValueInfoProto:
    return helper.make_tensor_value_info(*value)


def text_model(**options: Any) -> onnx.ModelProto:
    """Token ids and a mask, both with free batch and length: an embedding, a product, a head."""
    node = helper.make_node
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]), node("Cast", ["attention_mask"], ["m"], to=TensorProto.FLOAT),
        node("Unsqueeze", ["m", "two"], ["m3"]), node("Mul", ["e", "m3"], ["seen"]),
        node("MatMul", ["seen", "weight"], ["y"], name="head"), node("Relu", ["y"], ["logits"]),
    ]  # fmt: skip
    weights = {"table": RANDOM.standard_normal((100, 32)).astype(np.float32), "two": np.array([2]),
               "weight": RANDOM.standard_normal((32, 8)).astype(np.float32) / 5}  # fmt: skip
    shape = ["batch_size", "sequence_length"]
    inputs = [("input_ids", TensorProto.INT64, shape), ("attention_mask", TensorProto.INT64, shape)]
    return graph(nodes, inputs, [("logits", TensorProto.FLOAT, [*shape, 8])], weights, **options)


def image_model() -> onnx.ModelProto:
    """As written years ago: operator set 9, weights among the inputs, a batch without a name, free height and width."""
    node = helper.make_node
    nodes = [node("Conv", ["x", "w"], ["c"], pads=[1, 1, 1, 1]), node("Relu", ["c"], ["r"]),
             node("GlobalAveragePool", ["r"], ["p"]), node("Squeeze", ["p"], ["q"], axes=[2, 3]),
             node("Gemm", ["q", "f", "b"], ["y"])]  # fmt: skip
    weights = {"w": RANDOM.standard_normal((4, 3, 3, 3)).astype(np.float32) / 5,
               "f": RANDOM.standard_normal((4, 10)).astype(np.float32), "b": np.zeros(10, np.float32)}  # fmt: skip
    return graph(nodes, [("x", TensorProto.FLOAT, [None, 3, "h", "w_"])], [("y", TensorProto.FLOAT, [None, 10])],
                 weights, opset=9, ir_version=3)  # fmt: skip


def sums_model(total: str) -> onnx.ModelProto:
    """Two parts joined, and a mask over the whole, whose length is `total`."""
    node = helper.make_node
    nodes = [node("Concat", ["past", "x"], ["all"], axis=1), node("Mul", ["all", "mask"], ["y"])]
    inputs = [("x", TensorProto.FLOAT, ["batch", "new", 4]), ("past", TensorProto.FLOAT, ["batch", "past", 4]),
              ("mask", TensorProto.FLOAT, ["batch", total, 1])]  # fmt: skip
    return graph(nodes, inputs, [("y", TensorProto.FLOAT, ["batch", total, 4])], {})


def save(model: onnx.ModelProto, path: Path, *, external: bool = False) -> Path:
    """Write a model; with `external` its larger weights lie in `weights.bin` beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=1000)
    return path

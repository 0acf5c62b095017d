"""What an engine really runs: how many of its nodes, and how much of its computing, in which precision.

The engine itself is asked, since a profile's precision is only what was wished for: ONNX Runtime by its profiler,
OpenVINO by its runtime model, TorchScript by torch's profiler. TensorRT's networks are strongly typed: the graph that
its compiler was given says in which precision each product runs. Computing is counted as the multiplications and
additions of matrix products, convolutions, attention and recurrent layers, from the shapes of the timed case, with the
channels that an engine pads to its vectors.
"""

from __future__ import annotations

import importlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deploytool.artifact import Artifact
from deploytool.signature import Feeds

Shape = Sequence[int]

_READERS = {
    "onnx": "deploytool.backends.ran_onnx",
    "openvino": "deploytool.backends.ran_openvino",
    "torchscript": "deploytool.backends.ran_torchscript",
    "tensorrt": "deploytool.backends.ran_tensorrt",
}


@dataclass(frozen=True)
class Node:
    """One node that ran.

    precision   "int8", "fp16", "bf16", "fp32", ...; "other" for whole numbers and truth values
    flops       operations of a product; 0 for what is no product, None for a product that could not be counted
    fused       whether it stands for several operators of the model
    place       what ran it: "CPU", or the name of the part that it was delegated to
    """

    op: str
    precision: str
    flops: int | None = 0
    fused: bool = False
    place: str = "CPU"


def what_ran(artifact: Artifact, feeds: Feeds) -> dict[str, Any] | None:
    """What `artifact` runs for `feeds`; None for the live module, {"unknown": why} where its engine does not tell.

    nodes, flops                    counts
    nodes_by_precision              shares of the nodes, 0 to 1
    compute_by_precision            shares of the flops, 0 to 1; empty where there are no products
    fused, delegated                shares of the nodes; the latter by the name of what they were delegated to
    uncounted                       kinds of products that are not in the flops
    source                          where this is known from
    """
    if artifact.format not in _READERS:
        return None
    try:
        source, nodes = importlib.import_module(_READERS[artifact.format]).read(artifact, feeds)
    except Exception as error:  # a report on the engine: what keeps it from being made is told, and fails nothing
        return {"unknown": f"{type(error).__name__}: {str(error)[:300]}"}
    return {"source": source, **summary(nodes)} if nodes else {"unknown": f"{source} named no node"}


def summary(nodes: Sequence[Node]) -> dict[str, Any]:
    """The shares of the nodes; see `what_ran`."""
    flops: Counter[str] = Counter()
    for node in nodes:
        flops[node.precision] += node.flops or 0
    return {
        "nodes": len(nodes),
        "flops": flops.total(),
        "nodes_by_precision": _shares(Counter(node.precision for node in nodes)),
        "compute_by_precision": _shares(+flops),
        "fused": sum(node.fused for node in nodes) / len(nodes),
        "delegated": _shares(Counter(node.place for node in nodes), without="CPU"),
        "uncounted": sorted({node.op for node in nodes if node.flops is None}),
    }


def _shares(counts: Mapping[str, int], without: str | None = None) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items()) if name != without}


def product(left: Shape, out: Shape) -> int:
    """Flops of a matrix product [..., m, k] x [..., k, n] -> [..., m, n]; `left` may be transposed."""
    if not out or not math.prod(out):
        return 0
    inner = math.prod(left) * out[-1] // math.prod(out) if len(left) >= len(out) else left[-1]
    return 2 * math.prod(out) * max(inner, 1)


def convolution(out: Shape, kernel: Iterable[int]) -> int:
    """Flops of a convolution: every output takes one product per weight of its own filter, `kernel` [C / groups, ...].

    For a transposed one, `out` is its input and `kernel` [outputs / groups, ...].
    """
    return 2 * math.prod(out) * math.prod(kernel)


def attention(query: Shape, length: int, width: int) -> int:
    """Flops of softmax(Q K^T) V: two products of `length` keys for each of the queries, over all heads' `width`."""
    return 4 * math.prod(query) * length * width


def recurrent(steps: int, weights: Iterable[Shape]) -> int:
    """Flops of `steps` (length times batch) through the weights of a recurrent layer."""
    return 2 * steps * sum(math.prod(weight) for weight in weights)

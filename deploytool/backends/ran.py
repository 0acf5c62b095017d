"""What an engine really runs: how many of its nodes, and how much of its computing, in which precision.

The engine itself is asked, since a profile's precision is only what was wished for: ONNX Runtime by its profiler,
OpenVINO by its runtime model, TorchScript by torch's profiler. TensorRT's networks are strongly typed: the graph that
its compiler was given says in which precision each product runs, and AOTInductor's graph is written down while it
compiles. Computing is counted as the multiplications and additions of matrix products, convolutions, attention and
recurrent layers, from the shapes of the timed case, with the channels that an engine pads to its vectors.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.runner import Runner
from deploytool.signature import Feeds, Outputs

Shape = Sequence[int]

_READERS = {
    "onnx": "deploytool.backends.ran_onnx",
    "openvino": "deploytool.backends.ran_openvino",
    "torchscript": "deploytool.backends.ran_torchscript",
    "executorch": "deploytool.backends.ran_executorch",
    "tensorrt": "deploytool.backends.ran_tensorrt",
    "pt2": "deploytool.backends.ran_inductor",
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


class Asked:
    """An artifact opened for running, whose engine is asked at the first call what it runs; a context manager.

    An engine that tells it of the session at hand is opened once; the others are opened again by `ran`.
    """

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._reader: Any = None
        self._found: dict[str, Any] | None = None
        if artifact.format in _READERS:
            with self._telling():
                self._reader = importlib.import_module(_READERS[artifact.format])

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        if hasattr(self._reader, "open_asked"):
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="deploytool-"))
            self._runner: Runner = self._stack.enter_context(self._reader.open_asked(self._artifact, folder))
        else:
            self._runner = self._stack.enter_context(open_artifact(self._artifact))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        del self._runner  # what is asked after this is opened anew

    def run(self, feeds: Feeds) -> Outputs:
        """Run the engine; after the first call it is asked."""
        outputs = self._runner.run(feeds)
        if self._found is None and hasattr(self._reader, "read_asked"):
            with self._telling():
                self._tell(*self._reader.read_asked(self._runner, self._artifact, feeds))
        return outputs

    def ran(self, feeds: Feeds) -> dict[str, Any] | None:
        """What ran in the first call, of `feeds`: None for the live module, {"unknown": why} where nothing tells it.

        nodes, flops                    counts
        nodes_by_precision              shares of the nodes, 0 to 1
        compute_by_precision            shares of the flops, 0 to 1; empty where there are no products
        fused, delegated                shares of the nodes; the latter by the name of what they were delegated to
        uncounted                       kinds of products that are not in the flops
        source                          where this is known from
        """
        if self._found is None and self._reader is not None:
            with self._telling():
                self._tell(*self._reader.read(self._artifact, feeds))
        return self._found

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """A report on the engine: what keeps it from being made is told, and fails nothing."""
        try:
            yield
        except Exception as error:
            self._found = {"unknown": f"{type(error).__name__}: {str(error)[:300]}"}

    def _tell(self, source: str, nodes: Sequence[Node]) -> None:
        self._found = {"source": source, **summary(nodes)} if nodes else {"unknown": f"{source} named no node"}


def summary(nodes: Sequence[Node]) -> dict[str, Any]:
    """The shares of the nodes; see `Asked.ran`."""
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

"""A graph that can be cut: any of its tensors can be given from outside, and any can be asked for.

That is what finding the first wrong node needs. `run` builds the sub-model between what is given and what is wanted,
runs it in the artifact's own engine, and leaves every other edge as it is, so that what the engine fuses inside stays
fused.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from deploytool.artifact import Artifact
from deploytool.errors import InputRefused
from deploytool.signature import Feeds, Outputs

CUTTERS = {
    "onnxruntime": "deploytool.backends.onnx_cut",
    "tensorrt": "deploytool.backends.onnx_cut",
    "openvino": "deploytool.backends.openvino_cut",
    "torchscript": "deploytool.backends.torchscript_cut",
    "fbgemm": "deploytool.backends.torchscript_cut",
    "inductor": "deploytool.backends.inductor_cut",
    "inductor_int8": "deploytool.backends.inductor_cut",
}
COMPILED = ("inductor", "inductor_int8")  # what is cut is not what runs, but what that was compiled of
_WITHOUT = {
    "eager": "runs the module itself",
    "executorch": "runs a program with compiled parts, whose tensors cannot be given or taken from outside",
}


@dataclass(frozen=True)
class CutNode:
    """One operator. `inputs` are tensors that are computed or fed, by position; `constants` names, by position.

    module      path of the source module that it came from, "" where the graph does not say
    attributes  as JSON data
    """

    name: str
    kind: str
    inputs: Mapping[int, str]
    outputs: tuple[str, ...]
    constants: Mapping[int, str] = field(default_factory=dict)
    module: str = ""
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Stored:
    """A weight that is kept in whole numbers: `values` turned back to floats (float64), and the size of one `steps`.

    Laid out as the operator that reads it has it; `steps` can be broadcast to `values`.
    """

    values: np.ndarray
    steps: np.ndarray


class CutGraph(Protocol):
    """Nodes in an order in which each follows its inputs; `outputs` are names of tensors."""

    nodes: tuple[CutNode, ...]
    outputs: tuple[str, ...]

    def run(self, wanted: Sequence[str], given: Feeds) -> Outputs:
        """The wanted tensors, as the artifact's engine computes them from the given ones.

        A tensor that is given is read by its consumers in place of their own; one that is given and wanted too is
        computed from the others. Raises BackendFailed where the engine does not run.
        """
        ...

    def constant(self, name: str) -> np.ndarray | None:
        """The value of a constant; None where there is none of this name."""
        ...

    def stored(self, node: CutNode) -> Stored | None:
        """The weight that a node reads in whole numbers; None for nodes without, and for ways of storing unknown."""
        ...


def without_graph(backend: str) -> str:
    """What a backend that is none of CUTTERS runs instead, in words that follow its name."""
    return _WITHOUT.get(backend, "has no graph that can be cut here")


def open_cuts(artifact: Artifact, prepared: Path, ref: Mapping[str, str]) -> tuple[CutGraph, CutGraph]:
    """The model's own graph in fp32, computed plainly, and the artifact's, with the same names for the same tensors.

    `prepared` is the model's prepared folder. Raises InputRefused for a backend without a graph.
    """
    if artifact.backend not in CUTTERS:
        raise InputRefused("DT313", f"only an artifact with a graph can be bisected (got backend {artifact.backend!r}, "
                           f"which {without_graph(artifact.backend)})", fix="choose another target")  # fmt: skip
    cutter: Any = importlib.import_module(CUTTERS[artifact.backend])
    reference, candidate = cutter.open_cuts(artifact, prepared, ref)
    return reference, candidate


def producers(graph: CutGraph) -> dict[str, CutNode]:
    """The node that makes each tensor."""
    return {name: node for node in graph.nodes for name in node.outputs}


def cone(made_by: Mapping[str, CutNode], tensor: str, stops: Set[str]) -> Iterator[CutNode]:
    """The nodes between a tensor and the nearest tensors of `stops` before it, the tensor's own node first."""
    ahead, seen = [tensor], {tensor}
    while ahead:
        node = made_by.get(ahead.pop())
        if node is None:
            continue
        yield node
        fresh = [name for name in node.inputs.values() if name not in seen and name not in stops]
        seen.update(fresh)
        ahead += fresh

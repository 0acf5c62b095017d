"""What a profile promises of an artifact's operators, held against the graph's attributes: nothing is run.

A product of low-bit weights takes its inputs as they are, or rounds them to int8 first, as its `accuracy_level` says.
Both are right within what such an artifact may cost, so outputs cannot tell that the wrong one was written.
Operator: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
"""

from __future__ import annotations

import importlib
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.cut import CUTTERS, CutNode
from deploytool.backends.tables import ACCURACY_LEVELS, OnnxRuntimeBuild

PROMISE = "accuracy level"
_PRODUCT = "MatMulNBits"
_LEVEL = "accuracy_level"


def broken_promises(artifact: Artifact) -> dict[str, tuple[CutNode, str]]:
    """Nodes that compute in another arithmetic than the profile says, by name, each with a sentence.

    Of ONNX Runtime's weight-only artifacts; others make no such promise. A file in its own format shows no nodes.
    """
    build = artifact.target.get("build", {})
    weights_only = artifact.precision == "int4" or build.get("scheme") == "weights"
    if artifact.backend != "onnxruntime" or not weights_only or artifact.main_file.suffix != ".onnx":
        return {}
    activations = build.get("activations", OnnxRuntimeBuild().activations)
    level = ACCURACY_LEVELS.get(activations)
    cutter: Any = importlib.import_module(CUTTERS[artifact.backend])
    broken = {}
    for node in cutter.nodes_of(artifact.main_file, _PRODUCT):
        if (found := node.attributes.get(_LEVEL, 0)) != level:
            broken[node.name] = (node, f"{_LEVEL} must be {level}, as activations = {activations!r} of the profile "
                                       f"promises (got {found})")  # fmt: skip
    return broken

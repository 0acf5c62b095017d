"""What a TensorRT engine runs: its layers, as its inspector tells them, or the graph that it was built from."""

from __future__ import annotations

from dataclasses import replace

from deploytool.artifact import Artifact
from deploytool.backends.ran import Node
from deploytool.backends.ran_onnx import read_graph
from deploytool.backends.tensorrt_layers import UNASKED
from deploytool.signature import Feeds


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """Nodes of the graph that the compiler was given: TensorRT networks are strongly typed, so their precisions hold.

    A product between learned or calibrated grids counts as int8, which is how TensorRT reads a Q/DQ graph. Which of the
    nodes the compiler fused, and whether it had an int8 kernel for each, is the engine's own.
    """
    graph = replace(artifact, entry=str(artifact.settings["graph"]))
    nodes = read_graph(graph, feeds, str(artifact.settings.get("parity_graph", "")))
    told = "the graph that the compiler was given, nothing fused yet"
    if any(node.precision in ("int8", "fp8") and node.flops for node in nodes):
        told += "; int8 and fp8 are its products between grids, as they are written"
    told += f"; the engine itself: {artifact.settings.get('inspector', UNASKED)}"
    return told, nodes

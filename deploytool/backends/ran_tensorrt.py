"""What a TensorRT engine runs: its layers, as its inspector tells them, or the graph that it was built from."""

from __future__ import annotations

from dataclasses import replace

from deploytool.artifact import Artifact
from deploytool.backends.ran import Node
from deploytool.backends.ran_onnx import read_graph
from deploytool.signature import Feeds


def read(artifact: Artifact, feeds: Feeds) -> tuple[str, list[Node]]:
    """Nodes of the graph that the compiler was given: TensorRT networks are strongly typed, so their precisions hold.

    Which of them the compiler fused is the engine's own.
    """
    graph = replace(artifact, entry=str(artifact.settings["graph"]))
    return "the graph that the compiler was given, nothing fused yet", read_graph(graph, feeds)

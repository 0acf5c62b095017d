"""Graphs of whole numbers, cut: each tensor of a right one follows from those before it, its weights from the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from workshop import TINY, Workshop

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")

from deploytool.backends.cut import CutGraph, open_cuts
from deploytool.cases import Case
from deploytool.source import ModelRef
from deploytool.verify.bisect import Search
from deploytool.verify.weights import STEPS_MAX, steps_off, weight_pairs


def search(workshop: Workshop, name: str, target: str, prepared: Path) -> Search:
    """A search in a right artifact of a tiny source."""
    artifact = workshop.artifact(name, target)
    feeds = workshop.feeds(name)
    for index, inputs in enumerate(feeds):
        Case(inputs).save(prepared / "calibration" / f"{index:03d}.npz")
    if target != "fbgemm":
        (prepared / "onnx").symlink_to(workshop.portable(name).folder)
    reference, candidate = open_cuts(artifact, prepared, asdict(ModelRef("python", name, str(TINY / f"{name}.py"))))
    return Search(reference, candidate, feeds[0], artifact.precision)


@pytest.mark.parametrize(
    ("name", "target", "weights"),
    [("conv", "fbgemm", 1), ("mlp", "fbgemm", 1), ("encoder", "fbgemm", 4), ("mlp", "ort-int8", 1),
     ("encoder", "ort-int8", 4)],
)
def test_right_graphs_are_right_node_by_node(
    name: str, target: str, weights: int, workshop: Workshop, tmp_path: Path
) -> None:
    """No node may be blamed, tensors of whole numbers included, and stored weights be a rounding away, not more."""
    found = search(workshop, name, target, tmp_path)
    judged = found.judged()
    assert judged and max(suspect.excess for suspect in judged) < 1
    pairs = [pair for s in judged for pair in weight_pairs(s.region, s.candidates, found.reference, found.candidate)]
    assert len(pairs) >= weights
    assert max(steps_off(weight, stored) for _, weight, stored in pairs) < 0.51
    for _, weight, stored in pairs:
        assert steps_off(weight + 2 * np.abs(stored.steps), stored) > STEPS_MAX


def test_whole_numbers_are_given_in_their_own_grid(workshop: Workshop, tmp_path: Path) -> None:
    """What is given for a tensor of whole numbers must come out of the next layer as floats of the right size."""
    found = search(workshop, "conv", "fbgemm", tmp_path)
    graph: CutGraph = found.candidate
    whole = [node for node in graph.nodes if node.kind.startswith("quantized::") and node.outputs[0] in found.values]
    assert len(whole) > 1
    for node in whole:
        given = {**found.inputs, **{name: found.values[name] for name in found.names}}
        got = graph.run([node.outputs[0]], given)[node.outputs[0]]
        assert got.dtype == np.float32 and np.isfinite(got).all()
        assert np.abs(got - found.values[node.outputs[0]]).max() < 0.2 * np.abs(found.values[node.outputs[0]]).max()

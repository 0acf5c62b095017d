"""Whether each node of an artifact is right by itself: what small errors of outputs can hide.

An output may be within its limit while a node is wrong: a softmax cancels what is added to all its inputs, a norm what
shifts all its outputs, and beside the error of int8 itself one wrong zero point is hard to see. So every tensor that
the artifact's graph shares with the model's is computed once more from the right values before it (see bisect.py), and
every stored weight is held against the model's (weights.py). What is beyond its bound is a fault, and so is a node that
computes in another arithmetic than its profile says (promise.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.cut import COMPILED, CUTTERS, open_cuts, without_graph
from deploytool.cases import Case
from deploytool.errors import counted
from deploytool.verify.bisect import Search, few_cases, floats_of, has_sharp_bounds
from deploytool.verify.cause import Suspect, likely_cause
from deploytool.verify.promise import PROMISE, broken_promises

_LARGEST_BYTES = 250_000_000  # of a graph: cut graphs are copied, and all of a case's tensors are held
_SHOWN = 8


def unjudged(artifact: Artifact) -> str | None:
    """Why an artifact's nodes are not judged; None where they are."""
    if artifact.backend not in CUTTERS:
        return f"backend {artifact.backend} {without_graph(artifact.backend)}"
    if artifact.backend in COMPILED:
        return f"backend {artifact.backend} runs a compiled library: --bisect looks at the program that it was made of"
    if artifact.main_file.suffix == ".ort":
        return "ONNX Runtime's own format holds no graph that can be cut"
    if artifact.precision == "int4":
        return "what a node of 4-bit weights may cost is not known"
    if artifact.size_bytes > _LARGEST_BYTES:
        return f"the artifact has {artifact.size_bytes} bytes, more than {_LARGEST_BYTES}: --bisect looks at its nodes"
    return None


def nodes_job(artifact: str, prepared: str, ref: Mapping[str, str]) -> dict[str, Any]:
    """Judge every node of an artifact (in a worker); what the profile promises also of those that are not judged.

    Returns {"tensors": judged, "cases": how many each was computed of, "unjudged": why of the whole or None,
    "uncertain": tensors whose bound is not sharp, "refused": tensors that cannot be cut out, "wrong": [a node each]}.
    """
    opened, folder = Artifact.load(Path(artifact), check=False), Path(prepared)
    broken = _broken(opened)
    why = unjudged(opened)
    if why:
        return {**not_judged(why), "wrong": broken}
    reference, candidate = open_cuts(opened, folder, ref)
    chosen = few_cases(folder)
    found: dict[str, dict[str, Any]] = {wrong["tensor"]: wrong for wrong in broken}
    counts = {"tensors": 0, "uncertain": 0, "refused": 0}
    for path in chosen:
        search = Search(reference, candidate, Case.load(path).inputs, opened.precision, floats_of(opened),
                        sharp=has_sharp_bounds(opened))  # fmt: skip
        judged = search.judged()
        sharp = [suspect for suspect in judged if suspect.sharp]
        counts = {"tensors": len(sharp), "uncertain": len(judged) - len(sharp), "refused": len(search.failures)}
        for suspect in sharp:
            if suspect.excess > 1 and suspect.tensor not in found:
                found[suspect.tensor] = _told(suspect, search, int(path.stem))
    return {**counts, "cases": len(chosen), "unjudged": None, "wrong": list(found.values())}


def not_judged(why: str) -> dict[str, Any]:
    """What `nodes_job` returns where it does not look at the nodes."""
    return {"tensors": 0, "cases": 0, "unjudged": why, "uncertain": 0, "refused": 0, "wrong": []}


def _told(suspect: Suspect, search: Search, case: int) -> dict[str, Any]:
    why = likely_cause(suspect, search.reference, search.candidate, search.value)
    node = suspect.node
    return {"node": node.name, "kind": node.kind, "module": node.module, "tensor": suspect.tensor, "case": case,
            "own_error": suspect.error if math.isfinite(suspect.error) else None, "allowed": suspect.bound,
            "allowed_from": suspect.why, "weight_steps": suspect.steps if math.isfinite(suspect.steps) else None,
            **why}  # fmt: skip


def promises_job(artifact: str) -> list[dict[str, Any]]:
    """The nodes that break what the profile promises (in a worker): what is left where judging them all failed."""
    return _broken(Artifact.load(Path(artifact), check=False))


def _broken(artifact: Artifact) -> list[dict[str, Any]]:
    """Nodes that were not run: what they promise is enough."""
    unmeasured = dict.fromkeys(("case", "own_error", "allowed", "weight_steps"))
    return [{"node": node.name, "kind": node.kind, "module": node.module, "tensor": node.outputs[0], **unmeasured,
             "allowed_from": "the profile", "cause": PROMISE, "sentence": sentence}
            for node, sentence in broken_promises(artifact).values()]  # fmt: skip


def judge_nodes(nodes: Mapping[str, Any] | None) -> list[str]:
    """What is wrong with figures that `nodes_job` returned, a sentence for each node; empty where none is."""
    if nodes is None:
        return []
    said = [f"{wrong['kind']} {wrong['node']} is wrong by itself: {wrong['cause']}: {wrong['sentence']}"
            for wrong in nodes["wrong"][:_SHOWN]]  # fmt: skip
    more = len(nodes["wrong"]) - _SHOWN
    return said + ([f"and {more} more nodes are wrong by themselves"] if more > 0 else [])


def unjudged_said(nodes: Mapping[str, Any]) -> list[str]:
    """What of the nodes was not judged, in sentences."""
    if nodes["unjudged"]:
        return [f"nodes were not judged by themselves: {nodes['unjudged']}"]
    said = []
    if nodes["uncertain"]:
        said.append(f"not judged alone: {counted(nodes['uncertain'], 'node')} of static or grouped whole numbers: "
                    "their loss depends on ranges that calibration fixed")  # fmt: skip
    if nodes["refused"]:
        said.append(f"cannot be run alone: {counted(nodes['refused'], 'node')}")
    return said

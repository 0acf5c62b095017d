"""Finds the first node where an artifact and its model part.

The artifact's graph is cut at the tensors that it shares with the model's own graph. Between two cuts it is replayed,
in its own engine, on what the model computes there: an error that comes out was made between them. Single nodes are
judged by what their precision explains (rounding.py). Where every node is right alone, the graph as the engine fuses
it is searched by halves, over cuts at which few tensors are alive.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.backends.cut import CutGraph, CutNode, cone, open_cuts, producers
from deploytool.cases import Case, case_files
from deploytool.errors import BackendFailed
from deploytool.signature import Feeds, Outputs
from deploytool.verify.cause import Suspect, likely_cause
from deploytool.verify.promise import broken_promises
from deploytool.verify.rounding import allowed, distance, in_few_bits, is_quantized
from deploytool.verify.weights import steps_off, weight_pairs

_SHOWN = 8
_NEAR_WORST = 0.5  # of several cases that are about as wrong, the smallest is replayed
_JUMP = 4.0  # times the error before a piece: what many small errors do not add at once
_FIRST_OF = 0.2  # without sharp bounds, the first node of at least this share of the worst one's excess is named


def bisect_job(artifact: str, prepared: str, ref: Mapping[str, str]) -> dict[str, Any]:
    """The first node of an artifact that is wrong on the case where its outputs are (in a worker).

    `prepared` is the model's prepared folder, `ref` the model. Raises InputRefused for an artifact without a graph.
    """
    started = time.perf_counter()
    opened, folder = Artifact.load(Path(artifact), check=False), Path(prepared)
    reference, candidate = open_cuts(opened, folder, ref)
    path, error = worst_case(opened, folder / "cases")
    broken = {name: sentence for name, (_, sentence) in broken_promises(opened).items()}
    replays, found = 0, None
    for tried in dict.fromkeys([path, *few_cases(folder)]):  # a node may be wrong on one case and not on another
        runs = error < math.inf or tried != path
        inputs, sharp = Case.load(tried).inputs, has_sharp_bounds(opened)
        search = Search(reference, candidate, inputs, opened.precision, floats_of(opened), runs, sharp, broken)
        told = search.find()
        replays += search.replays
        if found is None or told["found"] == "node":
            found = {"case": int(tried.stem), "output_error": _finite(error), **told}
        if told["found"] == "node":
            break
    assert found is not None  # there is at least one case
    return {**found, "replays": replays, "seconds": time.perf_counter() - started}


def few_cases(prepared: Path) -> list[Path]:
    """The cases whose every tensor is looked at: the smallest, and the one that is timed."""
    files = case_files(prepared / "cases")
    return list(dict.fromkeys([min(files, key=lambda path: path.stat().st_size), files[0]]))


def has_sharp_bounds(artifact: Artifact) -> bool:
    """Whether what a right node of whole numbers costs follows from the tensors themselves.

    Not where ranges were learned, or fixed on a few feeds by cutting off, or NNCF moved sizes between weights and
    activations, nor for 4 bits and fp8. fbgemm's static ranges hold all that its feeds had.
    """
    if artifact.precision != "int8":
        return not in_few_bits(artifact.precision)
    schemes = {"onnxruntime": ("dynamic",), "fbgemm": ("dynamic", "static"), "inductor_int8": ("dynamic",)}
    calibrated = artifact.backend == "inductor_int8" and "calibration" in artifact.settings
    return artifact.settings.get("scheme", "dynamic") in schemes.get(artifact.backend, ()) and not calibrated


def floats_of(artifact: Artifact) -> str:
    """The floats of an artifact in few bits: what a TensorRT profile's `rest` says."""
    rest = str(artifact.settings.get("rest", "fp32"))
    return rest if rest in ("fp16", "bf16") else "fp32"


def worst_case(artifact: Artifact, cases: Path) -> tuple[Path, float]:
    """The smallest of the cases whose outputs are about as wrong as any, and how wrong they are."""
    errors: dict[Path, float] = {}
    with open_artifact(artifact) as runner:
        for path in case_files(cases):
            case = Case.load(path)
            try:
                outputs = runner.run(case.inputs)
            except BackendFailed:
                outputs = {}
            errors[path] = max(distance(array, outputs.get(name)) for name, array in case.reference.items())
    worst = max(errors.values())
    near = [path for path, error in errors.items() if error == worst or error >= _NEAR_WORST * worst]
    chosen = min(near, key=lambda path: path.stat().st_size)
    return chosen, errors[chosen]


@dataclass
class Search:
    """One case, replayed in pieces. `names` are the tensors that both graphs have, in the reference's order.

    `precision` is the artifact's, `floats` what it computes beside whole numbers and fp8 in: see floats_of.

    `runs` says that the whole artifact runs on the case: an engine that then refuses a piece of it refuses the cut.
    `sharp`: what a node may cost is known, for whole numbers too; see has_sharp_bounds. Never of a node that rounds in
    the model itself: a number between two codes falls to either by its last bit. `broken`: sentences on nodes of the
    candidate that break what the profile promises, by name.
    """

    reference: CutGraph
    candidate: CutGraph
    inputs: Feeds
    precision: str
    floats: str = "fp32"
    runs: bool = True
    sharp: bool = True
    broken: Mapping[str, str] = field(default_factory=dict)
    replays: int = 0
    values: Outputs = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._made = producers(self.reference)
        self._makes = producers(self.candidate)
        tensors = [name for node in self.reference.nodes for name in node.outputs]
        self.values = {**self.inputs, **self.reference.run(tensors, self.inputs)}
        self.names = [name for name in tensors if name in self._makes and name in self.values]
        self._stops = {*self.names, *self.inputs}

    def find(self) -> dict[str, Any]:
        """The first node that is wrong by itself, else what only the whole graph shows."""
        judged = self.judged()
        suspects = [suspect for suspect in judged if suspect.excess > 1]
        if suspects:
            worst = max(suspect.excess for suspect in suspects)
            first = next(s for s in suspects if s.sharp or s.excess >= _FIRST_OF * worst or s.excess == math.inf)
            return self._tell(first, [s for s in suspects if s is not first])
        return self._search_whole({suspect.tensor: suspect.bound for suspect in judged})

    def judged(self) -> list[Suspect]:
        """Every tensor of both graphs with the error of what makes it, in the reference's order."""
        return list(map(self._suspect, self.names, self._alone()))

    def replay(self, wanted: Sequence[str], given: Feeds) -> dict[str, np.ndarray | None]:
        """The candidate's tensors; None for those that it fails to compute, with the engine's words in `failures`."""
        self.replays += 1
        try:
            return {**self.candidate.run(wanted, given)}
        except BackendFailed as error:
            if len(wanted) == 1:
                self.failures[wanted[0]] = error.message
                return {wanted[0]: None}
        middle = len(wanted) // 2
        return {**self.replay(wanted[:middle], given), **self.replay(wanted[middle:], given)}

    def _alone(self) -> list[np.ndarray | None]:
        """Every shared tensor computed from the reference's values right before it."""
        given = {name: self.values[name] for name in self._stops}
        found = self.replay(self.names, given)
        return [found[name] for name in self.names]

    def _suspect(self, name: str, got: np.ndarray | None) -> Suspect:
        region = tuple(cone(self._made, name, self._stops))
        there = tuple(cone(self._makes, name, self._stops))
        expected, failure = self.values[name], self.failures.get(name, "")
        bound, why = allowed(region, there, self.value, expected, self.precision, self.floats)
        error = 0.0 if failure and self.runs else distance(expected, got)
        pairs = weight_pairs(region, there, self.reference, self.candidate)
        steps = max((steps_off(weight, stored) for _, weight, stored in pairs), default=0.0)
        broken = next((self.broken[node.name] for node in there if node.name in self.broken), "")
        return Suspect(name, region, there, expected, got, error, bound, why, failure, self.precision, steps, broken,
                       sharp=not is_quantized(region) and (self.sharp or not is_quantized(there)))  # fmt: skip

    def value(self, name: str) -> np.ndarray | None:
        """The right value of a tensor or a constant; None where there is none of this name."""
        return self.values[name] if name in self.values else self.reference.constant(name)

    def _tell(self, suspect: Suspect, others: Sequence[Suspect]) -> dict[str, Any]:
        """What is known of a node: its own error, the whole graph's before and after it, and why."""
        node = suspect.node
        before = [name for name in suspect.sources if name in self._makes]
        errors = self._in_place([*before, suspect.tensor])
        told = likely_cause(suspect, self.reference, self.candidate, self.value)
        return {
            "found": "node",
            **_place(node),
            "tensor": suspect.tensor,
            "between": [n.name for n in suspect.region],
            "own_error": _finite(suspect.error),
            "weight_steps": _finite(suspect.steps),
            "allowed": suspect.bound,
            "allowed_from": suspect.why,
            "error_before": _finite(max((errors[name] for name in before), default=0.0)),
            "error_after": _finite(errors[suspect.tensor]),
            "failure": suspect.failure or None,
            **told,
            "others": [{**_place(other.node), "own_error": _finite(other.error), "allowed": other.bound}
                       for other in others[:_SHOWN]],
            "sound": self._sound(len(others) + 1),
        }  # fmt: skip

    def _in_place(self, names: Sequence[str]) -> dict[str, float]:
        """Errors of tensors as the graph computes them from the case's inputs, fused as it is up to there."""
        wanted = [name for name in dict.fromkeys(names) if name not in self.inputs]
        found = self.replay(wanted, self.inputs) if wanted else {}
        return {name: distance(self.values[name], array) for name, array in found.items()}

    def _search_whole(self, bounds: Mapping[str, float]) -> dict[str, Any]:
        """No node is wrong alone: by halves, the first narrow cut behind which the fused graph is off."""
        cuts = self.narrow_cuts()
        outputs = [name for name in self.candidate.outputs if name in self.values]
        total = max(self._in_place(outputs).values(), default=0.0)
        floor = float(np.median(list(bounds.values())))
        limit = min(math.sqrt(floor * total), total / 2) if total < math.inf else 1.0
        low, high, errors = -1, len(cuts), {-1: 0.0, len(cuts): total}
        while high - low > 1:
            middle = (low + high) // 2
            errors[middle] = max(self._in_place(cuts[middle]).values(), default=0.0)
            low, high = (low, middle) if errors[middle] > limit else (middle, high)
        end = cuts[high] if high < len(cuts) else outputs
        own, between, fused = self._piece(cuts, low, end, limit, bounds)
        if not fused and errors[high] > _JUMP * max(errors[low], limit):
            start = low
            while not fused and start >= 0:  # what is wrong may have been fused across the cut
                start = start // 2 - 1 if start else -1
                wider = self._piece(cuts, start, end, limit, bounds)
                if wider[-1]:
                    low, (own, between, fused) = start, wider
            if low not in errors:
                errors[low] = max(self._in_place(cuts[low]).values(), default=0.0)
        node = self._made.get(end[-1]) or self.reference.nodes[-1]
        cause = ("each node is right by itself, and wrong as the engine computes them together: a fusion is wrong"
                 if fused else "no node is wrong by itself: small errors of many nodes add up")  # fmt: skip
        return {
            "found": "fusion" if fused else "accumulated",
            **_place(node),
            "tensor": end[-1],
            "between": between,
            "own_error": _finite(own),
            "error_before": _finite(errors[low]),
            "error_after": _finite(errors[high]),
            "cause": "fusion" if fused else "accumulated",
            "sentence": cause,
            "others": [],
            "sound": self._sound(0),
        }

    def _piece(
        self, cuts: Sequence[Sequence[str]], low: int, end: Sequence[str], limit: float, bounds: Mapping[str, float]
    ) -> tuple[float, list[str], bool]:
        """Of what lies between a cut, or the inputs, and `end`: its own error, its nodes, and whether it is wrong."""
        start = cuts[low] if low >= 0 else list(self.inputs)
        given = {**self.inputs, **{name: self.values[name] for name in start}}
        own = max((distance(self.values[n], a) for n, a in self.replay(end, given).items()), default=0.0)
        between = self._nodes_between(start, end)
        explained = math.hypot(*(bounds.get(name, 0.0) for n in between for name in n.outputs))
        return own, [node.name for node in between], own > max(limit, explained)

    def _sound(self, wrong: int) -> str:
        total, skipped = len(self.names), len(self.failures) if self.runs else 0
        unseen = f"; {skipped} cannot be cut out" if skipped else ""
        return f"{total - wrong - skipped} of {total} tensors are right by themselves{unseen}"

    def _nodes_between(self, start: Sequence[str], end: Sequence[str]) -> list[CutNode]:
        stops = {*start, *self.inputs}
        found = {node.name: node for name in end for node in cone(self._made, name, stops)}
        return [node for node in self.reference.nodes if node.name in found]

    def narrow_cuts(self) -> list[list[str]]:
        """Sets of shared float tensors that separate what is before from what is behind, where they are smallest."""
        last = {name: len(self.reference.nodes) for name in self.candidate.outputs}
        for index, node in enumerate(self.reference.nodes):
            last |= {name: max(index, last.get(name, 0)) for name in node.inputs.values()}
        alive: list[list[str]] = []
        now: list[str] = []
        for index, node in enumerate(self.reference.nodes):
            now = [name for name in now if last[name] > index]
            now += [name for name in node.outputs if name in self._stops and last.get(name, -1) > index
                    and self.values[name].dtype.kind == "f"]  # fmt: skip
            alive.append(list(now))
        reach = max(2, len(alive) // 64)
        widths = [len(names) or len(alive) for names in alive]
        return [alive[i] for i, width in enumerate(widths)
                if alive[i] and width == min(widths[max(0, i - reach) : i + reach + 1])]  # fmt: skip


def _place(node: CutNode) -> dict[str, str]:
    return {"node": node.name, "kind": node.kind, "module": node.module}


def _finite(number: float) -> float | None:
    """JSON has no infinity: None is an output that is not there, misshapen or not finite."""
    return number if math.isfinite(number) else None

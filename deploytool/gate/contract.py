"""What callers rely on: names, order, types and shapes of inputs and outputs, and the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deploytool.artifact import Artifact
from deploytool.results import Finding
from deploytool.signature import TensorSpec


def check_contract(target: str, candidate: Artifact, released: Artifact) -> Iterator[Finding]:
    """A caller of the released artifact can call the candidate without a change; other differences are noted."""
    problems, notes = [], []
    pairs = (("input", candidate.signature.inputs, released.signature.inputs),
             ("output", candidate.signature.outputs, released.signature.outputs))  # fmt: skip
    for kind, new, old in pairs:
        broken, said = _compare(kind, new, old)
        problems += broken
        notes += said
    problems += _device(candidate.target.get("device") or {}, released.target.get("device") or {})
    for problem in problems:
        yield Finding("contract", target, "fail", problem)
    if not problems:
        yield Finding("contract", target, "pass", "inputs, outputs and device are as released")
    for what in ("precision", "backend", "format"):
        was, now = getattr(released, what), getattr(candidate, what)
        if was != now:
            notes.append(f"{what} was {was} and is {now}")
    was, now = (_limits(artifact) for artifact in (released, candidate))
    if was != now:
        notes.append(f"the profile's parity limits were {was} and are {now}")
    for note in notes:
        yield Finding("contract", target, "note", note)


def _compare(kind: str, new: tuple[TensorSpec, ...], old: tuple[TensorSpec, ...]) -> tuple[list[str], list[str]]:
    ours, theirs = {s.name: s for s in new}, {s.name: s for s in old}
    broken = [f"{kind} {name!r} must be there (it is missing)" for name in theirs if name not in ours]
    added = [name for name in ours if name not in theirs]
    notes: list[str] = []
    if kind == "input":  # a caller does not know of it, and does not give it
        broken += [f"input {name!r} must not be asked for (it is new)" for name in added]
    else:
        notes += [f"output {name!r} is new" for name in added]
    kept = [name for name in ours if name in theirs]
    if kept != [name for name in theirs if name in ours]:
        broken.append(f"{kind}s must keep their order (got {', '.join(ours)})")
    for name in kept:
        spec, was = ours[name], theirs[name]
        if spec.dtype != was.dtype:
            broken.append(f"{kind} {name!r} must be {was.dtype} (got {spec.dtype})")
        if len(spec.shape) != len(was.shape):
            broken.append(f"{kind} {name!r} must have {len(was.shape)} dimensions (got {len(spec.shape)})")
        elif spec.shape != was.shape:
            sentence = f"{kind} {name!r} was {was} and is {spec}"
            (notes if _wider(spec, was) else broken).append(sentence)
    return broken, notes


def _wider(spec: TensorSpec, was: TensorSpec) -> bool:
    """Whether every dimension is the same number, or free: a caller's arrays still fit.

    Two dimensions that were free apart must not have become one.
    """
    pairs = list(zip(spec.shape, was.shape, strict=True))
    joined = {new for new, old in pairs for other, second in pairs
              if isinstance(new, str) and new == other and old != second}  # fmt: skip
    return not joined and all(isinstance(new, str) or new == old for new, old in pairs)


def _device(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    problems = []
    if new.get("architecture") != old.get("architecture"):
        problems.append(f"the device must stay {old.get('architecture')} (got {new.get('architecture')})")
    gone = set(old.get("compute_capabilities") or ()) - set(new.get("compute_capabilities") or ())
    if gone:
        problems.append(f"it must still run on {', '.join(sorted(gone))} (no longer built for)")
    return problems


def _limits(artifact: Artifact) -> dict[str, Any]:
    limits = artifact.target.get("parity") or {}
    return {key: value for key, value in limits.items() if value is not None}

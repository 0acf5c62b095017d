"""Why a node is wrong: its constants, attributes and inputs beside the reference's, then its numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from deploytool.backends.cut import CutGraph, CutNode
from deploytool.errors import DeployError
from deploytool.verify.promise import PROMISE
from deploytool.verify.rounding import Value, in_few_bits, is_quantized
from deploytool.verify.weights import STEPS_MAX, steps_off, weight_pairs

_SHAPING = ("Reshape", "Expand", "Tile", "ConstantOfShape", "aten::view", "aten::reshape", "aten::expand", "Broadcast")
_LOOKUPS = ("Gather", "aten::embedding")
_AXES = ("axis", "axes", "perm", "keepdims")
_HALF_END = 65504.0
_HALF_STEP = 2.0**-24  # between the smallest numbers of half precision
_DENORMAL = float(np.finfo(np.float32).tiny)
_TINY = 1e-30
_FEW = 3  # one or two numbers that happen to be the largest are no range
_MANY = 0.005  # a share of numbers at the very same end of the range
_SUFFIXES = (":half", ":full", ":cast", "_quantized", ":given")


@dataclass(frozen=True)
class Suspect:
    """A tensor that a replayed region of the candidate gets wrong.

    region      the reference's nodes, the tensor's own node first; candidates: those that take their place
    bound, why  what the precision explains
    steps       how many of its own steps a stored weight is off, at most; 0 where none is stored
    broken      what the profile promises of its nodes and does not hold, "" where all does
    sharp       whether all that a right node costs is in `bound`: ranges that calibration fixed are not
    failure     the engine's words where it did not run
    precision   what the artifact promises to compute in
    """

    tensor: str
    region: tuple[CutNode, ...]
    candidates: tuple[CutNode, ...]
    expected: np.ndarray
    got: np.ndarray | None
    error: float
    bound: float
    why: str
    failure: str
    precision: str
    steps: float = 0.0
    broken: str = ""
    sharp: bool = True

    @property
    def excess(self) -> float:
        """How many times what is allowed, of its output or of its weight; infinite where a promise is broken."""
        if self.broken:
            return math.inf
        own = self.error / self.bound if self.bound else math.inf if self.error else 0.0
        return max(own, self.steps / STEPS_MAX)

    @property
    def missing(self) -> tuple[CutNode, ...]:
        """Nodes of the reference without a counterpart, where the candidate did not merge them into another kind."""
        kinds = [node.kind for node in self.candidates]
        own = self.region[0].kind
        return self.region[1:] if len(self.region) > 1 and kinds == [own] else ()

    @property
    def node(self) -> CutNode:
        """The node to name."""
        return self.missing[0] if self.missing else self.region[0]

    @property
    def sources(self) -> list[str]:
        """Tensors that the region reads."""
        own = {name for node in self.region for name in node.outputs}
        return [name for node in self.region for name in node.inputs.values() if name not in own]


def likely_cause(suspect: Suspect, reference: CutGraph, candidate: CutGraph, values: Value) -> dict[str, str]:
    """{"cause": a word or two, "sentence": what was seen}; the first explanation that fits."""
    for cause, sentence in _explanations(suspect, reference, candidate, values):
        return {"cause": cause, "sentence": sentence}
    if suspect.error == math.inf:
        return {"cause": "unknown", "sentence": "its output cannot be compared with the reference's"}
    return {"cause": "rounding", "sentence": f"its own error is {suspect.error:.3g}, and {suspect.bound:.3g} is what "
            f"{suspect.why} explain"}  # fmt: skip


def _explanations(
    suspect: Suspect, reference: CutGraph, candidate: CutGraph, values: Value
) -> Iterator[tuple[str, str]]:
    if suspect.broken:
        yield PROMISE, suspect.broken
    if suspect.missing:
        yield "missing node", f"{suspect.missing[0].kind} is not in the artifact's graph"
    if is_quantized(suspect.candidates) and not in_few_bits(suspect.precision):
        yield "lower precision", f"{suspect.candidates[0].kind} computes in few bits, {suspect.precision} is promised"
    yield from _swapped(suspect)
    yield from _tiny(suspect, candidate)
    yield from _constants(suspect, reference, candidate)
    yield from _structure(suspect)
    yield from _shapes(suspect)
    if suspect.got is not None and suspect.got.dtype.kind == "f" and suspect.got.shape == suspect.expected.shape:
        yield from _numbers(suspect, values)
    if extra := _extra(suspect):
        yield "other operators", f"the artifact computes it with {', '.join(extra)}"


def _extra(suspect: Suspect) -> list[str]:
    """Kinds of operators that only the candidate has, but for those that change types."""
    known = {*(node.kind for node in suspect.region), "Cast", "Identity", "Convert"}
    return list(dict.fromkeys(node.kind for node in suspect.candidates if node.kind not in known))


def _pairs(suspect: Suspect) -> Iterator[tuple[CutNode, CutNode]]:
    """Nodes of the same kind, in order, of both graphs."""
    left = list(suspect.candidates)
    for node in suspect.region:
        twin = next((other for other in left if _kin(node.kind, other.kind)), None)
        if twin is not None:
            left.remove(twin)
            yield node, twin


def _kin(kind: str, other: str) -> bool:
    return kind == other or (kind, other) in {("MatMul", "MatMulInteger"), ("Gemm", "MatMul"), ("Conv", "ConvInteger")}


def _constants(suspect: Suspect, reference: CutGraph, candidate: CutGraph) -> Iterator[tuple[str, str]]:
    known = set()
    for name, weight, stored in weight_pairs(suspect.region, suspect.candidates, reference, candidate):
        known.add(name)
        if steps_off(weight, stored) > STEPS_MAX:
            yield _kind_of_weight(name, weight, stored.values, STEPS_MAX * np.abs(stored.steps))
    for node, twin in _pairs(suspect):
        for position, name in node.constants.items():
            expected = None if name in known else reference.constant(name)
            found = _effective(candidate, name, twin, position) if expected is not None else None
            if expected is not None and found is not None:
                yield from _compare_constant(node, name, expected, found, is_quantized(suspect.candidates))


def _effective(candidate: CutGraph, name: str, twin: CutNode, position: int) -> np.ndarray | None:
    """The constant as the candidate uses it."""
    if position in twin.constants:
        return candidate.constant(twin.constants[position])
    if position in twin.inputs:
        try:
            return candidate.run([twin.inputs[position]], {})[twin.inputs[position]]  # made of constants alone
        except (DeployError, KeyError):
            return None
    return None


def _compare_constant(
    node: CutNode, name: str, expected: np.ndarray, found: np.ndarray, quantized: bool
) -> Iterator[tuple[str, str]]:
    if expected.dtype.kind != "f":
        if not np.array_equal(expected, found):
            baked = node.kind in _SHAPING
            yield ("baked-in shape" if baked else "wrong constant",
                   f"{name} must be {expected.tolist()!s:.80} (got {found.tolist()!s:.80})")  # fmt: skip
        return
    if expected.shape != found.shape:
        if expected.T.shape == found.shape and np.allclose(expected.T, found, rtol=1e-2, atol=1e-3):
            yield "transposed weight", f"{name} is stored transposed"
        elif expected.size != found.size:
            yield "truncated table", f"{name} must be {list(expected.shape)} (got {list(found.shape)})"
        return
    ref, got = expected.astype(np.float64), found.astype(np.float64)
    if not np.isfinite(got).all():
        yield "broken weight", f"{name} holds NaN or infinity"
        return
    peak = float(np.abs(ref).max(initial=0.0)) or 1.0
    step = max(peak * (2 / 63 if quantized else 2e-3), _HALF_STEP if found.dtype == np.float16 else 0.0)
    if ref.size == 1 and not quantized and _is_another(expected, found, step):
        yield "wrong constant", f"{name} must be {ref.item():.6g} (got {got.item():.6g})"
        return
    if np.abs(ref - got).max(initial=0.0) <= step:
        if not quantized and found.dtype == np.float32 and not np.array_equal(expected, found):
            yield "stale weight", f"{name} differs in {int((expected != found).sum())} of {ref.size} numbers"
        return
    yield _kind_of_weight(name, ref, got, np.array(step))


def _is_another(expected: np.ndarray, found: np.ndarray, step: float) -> bool:
    """Whether a single number differs by more than its type explains."""
    off = abs(float(expected.item()) - float(found.item()))
    return off > step or (off > 0 and found.dtype == np.float32)


def _kind_of_weight(name: str, ref: np.ndarray, got: np.ndarray, step: np.ndarray) -> tuple[str, str]:
    """What was done to a weight; `step` is how far a right one may be off, of the whole or of each channel."""
    if not np.isfinite(got).all():
        return "broken weight", f"{name} holds NaN or infinity"
    if ref.ndim == 2 and ref.shape[0] == ref.shape[1] and np.all(np.abs(ref.T - got) <= step):
        return "transposed weight", f"{name} is stored transposed"
    channels = tuple(range(1, ref.ndim)) if ref.ndim > 2 else 0  # of a product's weight the columns, of others rows
    shift = np.median(got - ref, axis=channels, keepdims=True)
    if np.any(np.abs(shift) > step) and np.all(np.abs(got - ref - shift) <= step):
        return "wrong zero point", f"{name} is shifted by {float(np.median(shift)):.3g}"
    scale = float((ref * got).sum() / ((ref * ref).sum() or 1.0))
    if np.all(np.abs(got - scale * ref) <= step * max(1.0, abs(scale))):
        return "wrong scale", f"{name} is {scale:.3g} times what it must be"
    low, high = got.min(axis=channels, keepdims=True), got.max(axis=channels, keepdims=True)
    off = np.abs(ref - got) > step
    if off.sum() >= _FEW and np.all(np.abs(np.clip(ref, low, high) - got) <= step):
        return "range too narrow", f"{name} is cut off at {got.min():.3g} and {got.max():.3g}"
    return "stale weight", f"{name} differs from the model's in {float(off.mean()):.1%} of its numbers"


def _swapped(suspect: Suspect) -> Iterator[tuple[str, str]]:
    for node, twin in _pairs(suspect):
        before, after = _names(node), _names(twin)
        if node.kind == twin.kind and before != after and sorted(before) == sorted(after):
            yield "swapped inputs", f"it reads {', '.join(after)} in the place of {', '.join(before)}"
    if len(suspect.region) == len(suspect.candidates) == 1 and not list(_pairs(suspect)):
        was, now = suspect.region[0].kind, suspect.candidates[0].kind
        yield "other operators", f"{was} became {now}"


def _tiny(suspect: Suspect, candidate: CutGraph) -> Iterator[tuple[str, str]]:
    """Factors that alone or together go below what fp32 holds with all digits, in nodes that only the candidate has."""
    paired = {id(twin) for _, twin in _pairs(suspect)}
    size = 1.0
    for node in reversed(suspect.candidates):  # the first to run comes last
        for position, name in node.constants.items() if id(node) not in paired else ():
            factor = _factor(candidate.constant(name))
            if factor and "mul" in node.kind.lower():
                size *= factor
            elif factor and "div" in node.kind.lower() and position == 1:
                size /= factor
            if size < _TINY:
                yield "denormals", f"{node.kind} by {factor:.2g} makes numbers too small for the engine's arithmetic"
                return


def _factor(array: np.ndarray | None) -> float:
    """The size of a single number; 0 where there is none."""
    if array is None or array.dtype.kind != "f" or array.size != 1:
        return 0.0
    return abs(float(array.item()))


def _structure(suspect: Suspect) -> Iterator[tuple[str, str]]:
    for node, twin in _pairs(suspect):
        for key in sorted(node.attributes.keys() & twin.attributes.keys()):
            was, now = node.attributes[key], twin.attributes[key]
            if was != now and node.kind == twin.kind:
                yield ("wrong axis" if key in _AXES else "wrong attribute", f"{key} must be {was} (got {now})")
        if node.kind != twin.kind:
            continue
        before, after = _names(node), _names(twin)
        if before != after and not is_quantized(suspect.candidates) and len(suspect.candidates) == 1:
            yield "other input", f"it must read {', '.join(before)} (got {', '.join(after)})"
    if {"Clip", "Clamp"} & set(_extra(suspect)):
        yield "saturation", "its values are cut off"


def _names(node: CutNode) -> list[str]:
    return [_bare(node.inputs.get(i, node.constants.get(i, ""))) for i in sorted({*node.inputs, *node.constants})]


def _bare(name: str) -> str:
    for suffix in _SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def _shapes(suspect: Suspect) -> Iterator[tuple[str, str]]:
    kind = suspect.region[0].kind
    if suspect.failure:
        if kind.startswith(_LOOKUPS):
            yield "truncated table", f"an index is beyond the table: {suspect.failure[:200]}"
        yield "baked-in shape", f"it does not run at this size: {suspect.failure[:200]}"
    elif suspect.got is not None and suspect.got.shape != suspect.expected.shape:
        was, now = list(suspect.expected.shape), list(suspect.got.shape)
        if sorted(was) == sorted(now):
            yield "wrong axis", f"its output must be {was} (got {now})"
        yield "baked-in shape", f"its output must be {was} (got {now})"


def _numbers(suspect: Suspect, values: Value) -> Iterator[tuple[str, str]]:
    assert suspect.got is not None
    ref, got = suspect.expected.astype(np.float64), suspect.got.astype(np.float64)
    bad = ~np.isfinite(got) & np.isfinite(ref)
    if bad.any():
        if suspect.precision == "fp16":
            yield "fp16 overflow", (f"{int(bad.sum())} numbers become infinite or NaN in half precision, which ends at "
                                    f"65504; the model's reach {_largest(suspect, values):.3g}")  # fmt: skip
        yield "not a number", f"{int(bad.sum())} of {bad.size} numbers are NaN or infinite"
        return
    if suspect.got.dtype == np.float16 and float(np.abs(ref).max(initial=0.0)) > _HALF_END:
        yield "fp16 overflow", f"values up to {np.abs(ref).max():.3g} do not fit into half precision"
    if 0 < float(np.abs(ref).max(initial=0.0)) < _DENORMAL * 1e3 or _lost(ref, got):
        yield "denormals", "numbers too small for the engine's arithmetic became zero"
    yield from _clipped(ref, got)
    shift, scale = float(np.mean(got - ref)), _slope(ref, got)
    rest = float(np.sqrt(np.mean((got - ref - shift) ** 2)))
    if is_quantized(suspect.candidates):
        if abs(shift) > 3 * rest:
            yield "wrong zero point", f"its output is shifted by {shift:.3g}"
        if abs(scale - 1) > 0.2 and float(np.mean((got - scale * ref) ** 2)) < 0.1 * float(np.mean((got - ref) ** 2)):
            yield "wrong scale", f"its output is {scale:.3g} times what it must be"


def _largest(suspect: Suspect, values: Value) -> float:
    arrays = [suspect.expected, *(a for name in suspect.sources if (a := values(name)) is not None)]
    return max((float(np.abs(a[np.isfinite(a)]).max(initial=0.0)) for a in arrays if a.dtype.kind == "f"), default=0.0)


def _lost(ref: np.ndarray, got: np.ndarray) -> bool:
    gone = (got == 0) & (ref != 0)
    return bool(gone.any()) and float(np.abs(ref[gone]).max()) < _DENORMAL * 1e3


def _clipped(ref: np.ndarray, got: np.ndarray) -> Iterator[tuple[str, str]]:
    for end, name, beyond in ((got.max(initial=-np.inf), "above", ref > got.max(initial=-np.inf)),
                              (got.min(initial=np.inf), "below", ref < got.min(initial=np.inf))):  # fmt: skip
        at_end = float(np.isclose(got, end, rtol=1e-6, atol=0).mean())
        if at_end > _MANY and float(beyond.mean()) > _MANY / 2:
            yield "saturation", f"{at_end:.1%} of its numbers stand at {end:.4g}; the model's go {name} it"


def _slope(ref: np.ndarray, got: np.ndarray) -> float:
    return float((ref * got).sum() / ((ref * ref).sum() or 1.0))

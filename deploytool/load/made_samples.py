"""Samples for an ONNX graph that comes without any: seeded noise of the inputs' types, in the ranges that the graph
shows, at sizes that it runs at."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import GraphProto, NodeProto

from deploytool.decoding import PAST, TOKENS
from deploytool.errors import InputRefused
from deploytool.signature import Dim, Outputs, Signature, TensorSpec

Sizes = dict[str, int]
Objection = Callable[[Outputs], str]
Rule = str | tuple[str, tuple[str, ...]]  # "unequal", "equal", or a dimension and those that it is the sum of

_COUNT = 8
_BASES = (16, 64, 256, 1024, 4096, 16384)  # an encoder takes the first, a small image the second, sound the last
_IMAGE_RANK = 4
_TIMES = (1, 2, 3)
_AXES = {TOKENS: ("batch", "tokens"), "position_ids": ("batch", "tokens"), "attention_mask": ("batch", "total")}
_CACHE = ("batch", "", "past", "")  # what the axes of a cached key or value count
_TURNS = ((1, 16), (9, 16), (4, 32), (16, 7))  # tokens, and those in the cache before them
_KEEP_VALUES = frozenset({"Cast", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze",
                          "Transpose", "Unsqueeze"})  # fmt: skip
_LOOK_UP = frozenset({"Gather", "GatherElements", "GatherND"})


def made_samples(graph: GraphProto, inputs: Sequence[TensorSpec], objection: Objection) -> list[Outputs]:
    """Eight samples; the first is the smallest. `objection(feeds)` says why the graph refuses feeds, "" if it does not.

    Raises InputRefused when the graph runs at none of the sizes that are tried.
    """
    bounds = {spec.name: index_bound(graph, spec.name) for spec in inputs}
    free = Signature(tuple(inputs), ()).free
    said = ""
    turn = _Turn.of(inputs)
    for plan in turn.plans() if turn else _plans(inputs, free):
        samples = [_feeds(inputs, sizes, bounds, seed) for seed, sizes in enumerate(plan)]
        samples = list(map(_placed, samples)) if turn else samples
        problems = (objection(feeds) for feeds in samples)
        refused = next((problem for problem in problems if problem), "")
        if not refused:
            return samples
        said = said or refused
    tried = f" at any of the sizes that were tried for {', '.join(free)}" if free else ""
    raise InputRefused("DT303", f"the graph must run on samples made from its inputs' types (it does not{tried})",
                       detail=[said[:500], *map(str, inputs)], fix="give real ones: --samples FILE.npz")  # fmt: skip


def index_bound(graph: GraphProto, name: str) -> int | None:
    """How many rows the smallest table has that values of an input look things up in; None when there is none."""
    sizes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    sizes |= {n.output[0]: sizes[n.input[0]] for n in graph.node  # a table that is stored smaller than it is used
              if n.op_type in ("DequantizeLinear", "Cast") and n.input[0] in sizes}  # fmt: skip
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for read in dict.fromkeys(node.input):
            readers.setdefault(read, []).append(node)
    found, seen, ahead = [], {name}, [name]
    while ahead:
        value = ahead.pop()
        for node in readers.get(value, ()):
            if node.op_type in _LOOK_UP and value == node.input[1] and node.input[0] in sizes:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
                found.append(sizes[node.input[0]][axis])
            elif node.op_type in _KEEP_VALUES and value == node.input[0] and node.output[0] not in seen:
                seen.add(node.output[0])
                ahead.append(node.output[0])
    return min(found, default=None)


@dataclass(frozen=True)
class _Turn:
    """What the dimensions of a language model with a cache count: "batch", "tokens", "past" or "total".

    Attention with a cache believes what it is told: where tokens, mask and cache contradict one another it does not
    object as a plain operator would, but reads and writes beyond its memory.

    free   what each free dimension counts; several may count the same, as where exporters name one per layer
    fixed  the sizes of those that the graph fixes
    """

    free: Mapping[str, str]
    fixed: Mapping[str, int]

    @staticmethod
    def of(inputs: Sequence[TensorSpec]) -> _Turn | None:
        """Those of `inputs`; None for what is no such model, or where these four do not explain its dimensions."""
        known = {spec.name: _CACHE if spec.name.startswith(PAST) else _AXES.get(spec.name) for spec in inputs}
        if not known.keys() >= {TOKENS, "attention_mask"} or _CACHE not in known.values():
            return None
        found: set[tuple[Dim, str]] = set()
        for spec in inputs:
            axes = known[spec.name]
            if axes is not None and len(axes) != len(spec.shape):
                return None
            if axes is not None:
                found |= {pair for pair in zip(spec.shape, axes, strict=True) if pair[1]}
            elif len(spec.shape) > 1 and isinstance(spec.shape[0], str):
                found.add((spec.shape[0], "batch"))
        free = {dim: count for dim, count in found if isinstance(dim, str)}
        fixed = {count: dim for dim, count in found if isinstance(dim, int)}
        explained = len(free) + len(fixed) == len(found) and free.keys() >= set(Signature(tuple(inputs), ()).free)
        return _Turn(free, fixed) if explained and not fixed.keys() & {"past", "total"} else None

    def plans(self) -> Iterator[list[Sizes]]:
        """Decoding steps and prompts after a cache, at first in batches of several, then of one."""
        for batches in (_TIMES, (1,)):
            yield [self._sizes(batches[number % len(batches)], *_TURNS[number % len(_TURNS)])
                   for number in range(_COUNT)]  # fmt: skip

    def _sizes(self, batch: int, tokens: int, past: int) -> Sizes:
        counts = {"batch": batch, "tokens": tokens, "past": past, **self.fixed}
        counts["total"] = counts["past"] + counts["tokens"]
        return {dim: counts[count] for dim, count in self.free.items()}


def _placed(feeds: Outputs) -> Outputs:
    """A decoder's feeds with a mask that hides nothing, and positions that follow the cache."""
    past = next(array.shape[2] for name, array in feeds.items() if name.startswith(PAST))
    positions = np.arange(past, past + feeds[TOKENS].shape[1])
    made = {"attention_mask": 1, "position_ids": positions}
    return {name: np.full_like(array, made[name]) if name in made else array for name, array in feeds.items()}


def _plans(inputs: Sequence[TensorSpec], free: Sequence[str]) -> Iterator[list[Sizes]]:
    """Sizes of the free dimensions for every sample: small before large, unequal before equal, then sums of two."""
    batch = {dim for dim in free if all(dim not in spec.shape[1:] for spec in inputs)}
    formulas = {dim: tree for dim in free if (tree := _formula(dim, free)) is not None}
    own = [dim for dim in free if dim not in batch and dim not in formulas]
    image = any(len(spec.shape) >= _IMAGE_RANK and spec.dtype.startswith(("float", "uint8"))
                and any(dim in own for dim in spec.shape[2:]) for spec in inputs)  # fmt: skip
    bases = (*_BASES[1:], _BASES[0]) if image else _BASES
    rules: list[Rule] = ["unequal", "equal"] if len(own) > 1 else ["unequal"]
    rules += [(whole, parts) for whole in own for parts in itertools.combinations([d for d in own if d != whole], 2)]
    for base in bases if own else bases[:1]:
        for rule in rules:
            yield [_sizes(number, base, rule, own, sorted(batch), formulas) for number in range(_COUNT)]


def _sizes(
    number: int, base: int, rule: Rule, own: Sequence[str], batch: Sequence[str], formulas: Mapping[str, ast.Expression]
) -> Sizes:  # fmt: skip
    turn = {dim: index if rule != "equal" else 0 for index, dim in enumerate(own)}
    sizes = {dim: base * _TIMES[(number + turn[dim]) % len(_TIMES)] for dim in own}
    sizes |= {dim: _TIMES[number % len(_TIMES)] for dim in batch}
    if isinstance(rule, tuple):
        sizes[rule[0]] = sum(sizes[dim] for dim in rule[1])
    for dim, tree in formulas.items():
        sizes[dim] = _value(tree.body, sizes)
    return sizes


def _formula(dim: str, free: Sequence[str]) -> ast.Expression | None:
    """A dimension's name as arithmetic on other names, "past + 1"; None for a plain name."""
    try:
        tree = ast.parse(dim, mode="eval")
    except SyntaxError:
        return None
    allowed = (ast.Expression, ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Name, ast.Load, ast.Constant)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    plain = not isinstance(tree.body, ast.BinOp) or not all(isinstance(node, allowed) for node in ast.walk(tree))
    return None if plain or not names <= set(free) else tree


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    if isinstance(node, ast.Name):
        return sizes[node.id]
    if isinstance(node, ast.Constant):
        return int(node.value)  # type: ignore[arg-type]  # whatever else it is does not parse as a size
    assert isinstance(node, ast.BinOp)
    left, right = _value(node.left, sizes), _value(node.right, sizes)
    if isinstance(node.op, ast.Add):
        return left + right
    if isinstance(node.op, ast.Sub):
        return left - right
    return left * right if isinstance(node.op, ast.Mult) else left // max(right, 1)


def _feeds(inputs: Sequence[TensorSpec], sizes: Sizes, bounds: Mapping[str, int | None], seed: int) -> Outputs:
    random = np.random.default_rng(seed)
    return {spec.name: _array(random, spec, tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape),
                              bounds[spec.name]) for spec in inputs}  # fmt: skip


def _array(random: np.random.Generator, spec: TensorSpec, shape: tuple[int, ...], bound: int | None) -> np.ndarray:
    dtype = np.dtype(spec.dtype)
    if dtype.kind == "f":
        return random.standard_normal(shape).astype(dtype)
    if dtype.kind == "b":
        return random.random(shape) < 0.5
    if bound is not None:
        return random.integers(0, bound, shape).astype(dtype)
    if dtype.itemsize == 1:
        return random.integers(0, np.iinfo(dtype).max + 1, shape).astype(dtype)  # a picture
    return _mask(shape).astype(dtype)


def _mask(shape: tuple[int, ...]) -> np.ndarray:
    """Whole numbers that look nothing up are taken for a mask: 1, and in later rows a growing end of 0."""
    mask = np.ones(shape, np.int64)
    if len(shape) > 1:
        for row in range(1, min(shape[0], shape[-1])):
            mask[row, ..., -row:] = 0
    return mask

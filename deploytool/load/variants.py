"""The shapes that parity is taken at: the samples' own, and where those are few, real ones joined or cut."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from deploytool.errors import InputRefused
from deploytool.signature import Outputs, Signature

WANTED_SHAPES = 3
_JOINED = (2, 3)


def parity_feeds(signature: Signature, samples: Iterable[Mapping[str, np.ndarray]]) -> list[Outputs]:
    """Feeds for parity: every sample, then derived ones until a free dimension is seen at three sizes.

    Derived feeds are real data too: samples joined along a dimension that is always first, or a dimension of their
    own cut to a half and a quarter. A dimension is cut only where it alone is free (a mask's total length follows two
    others). Raises InputRefused when fewer than three shapes come of it.
    """
    feeds = [dict(sample) for sample in samples]
    for dim in signature.free:
        if len({sizes[dim] for sizes in map(signature.bind, feeds)}) < WANTED_SHAPES:
            feeds += _joined(signature, feeds, dim) if _is_batch(signature, dim) else _cut(signature, feeds, dim)
    if signature.free and shapes(signature, feeds) < WANTED_SHAPES:
        raise InputRefused("DT303", f"the samples must have {WANTED_SHAPES} different shapes, since "
                           f"{', '.join(map(repr, signature.free))} may differ (got {shapes(signature, feeds)})",
                           fix="give samples of more sizes, or fix the dimension in INPUTS")  # fmt: skip
    return feeds


def further_rows(signature: Signature, feeds: Sequence[Outputs]) -> list[Outputs]:
    """Feeds of one, two and three rows where none has so many: the sizes that engines treat apart, and an odd one.

    Rows are those of the smallest feed, in turn. Other dimensions are left: what cutting does to data is not known.
    """
    full = [feed for feed in feeds if all(signature.bind(feed).values())]
    if not full:
        return []
    smallest = min(full, key=lambda feed: sum(array.nbytes for array in feed.values()))
    made: list[Outputs] = []
    for dim in filter(lambda dim: _is_batch(signature, dim), signature.free):
        seen = {sizes[dim] for sizes in map(signature.bind, feeds)}
        lacking = {1, 2} - seen if any(size % 2 and size > 1 for size in seen) else {1, 2, 3} - seen
        made += [_rows(signature, smallest, dim, count) for count in sorted(lacking)]
    return made


def _rows(signature: Signature, feed: Outputs, dim: str, count: int) -> Outputs:
    size = signature.bind(feed)[dim]
    return _take(signature, feed, dim, [index % size for index in range(count)])


def _is_batch(signature: Signature, dim: str) -> bool:
    """Whether real samples can be joined along it: it is the first axis wherever it stands."""
    return all(dim not in spec.shape[1:] for spec in signature.inputs)


def shapes(signature: Signature, feeds: Sequence[Outputs]) -> int:
    """How many different sets of free sizes the feeds have."""
    return len({tuple(sorted(signature.bind(f).items())) for f in feeds})


def _joined(signature: Signature, feeds: Sequence[Outputs], dim: str) -> list[Outputs]:
    """The first feed repeated with its likes: all feeds whose other free sizes are equal to the first's."""
    others = [{k: v for k, v in signature.bind(f).items() if k != dim} for f in feeds]
    alike = [f for f, o in zip(feeds, others, strict=True) if o == others[0]]
    return [_join(signature, [alike[i % len(alike)] for i in range(count)], dim) for count in _JOINED]


def _join(signature: Signature, feeds: Sequence[Outputs], dim: str) -> Outputs:
    joined = dict(feeds[0])
    for spec in signature.inputs:
        if dim in spec.shape:
            joined[spec.name] = np.concatenate([f[spec.name] for f in feeds], axis=spec.shape.index(dim))
    return joined


def _cut(signature: Signature, feeds: Sequence[Outputs], dim: str) -> list[Outputs]:
    longest = max(feeds, key=lambda f: signature.bind(f)[dim])
    size = signature.bind(longest)[dim]
    kept = sorted({part for part in (size // 2, size // 4) if part > 0})
    return [_take(signature, longest, dim, range(part)) for part in kept]


def _take(signature: Signature, feeds: Outputs, dim: str, picked: Sequence[int]) -> Outputs:
    cut = dict(feeds)
    for spec in signature.inputs:
        for axis, name in enumerate(spec.shape):
            if name == dim:
                cut[spec.name] = np.take(cut[spec.name], picked, axis=axis)
    return cut

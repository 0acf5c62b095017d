"""Attention that never holds the full matrix of scores [queries, keys]: exact by blocks, or of a sparse pattern.

All take queries [batch, heads, n, d], keys and values [batch, heads, m, d], a scale, and an optional mask to add to the
scores, [batch or 1, heads or 1, n or 1, m]; all give [batch, heads, n, d]. They are pure functions of tensors that a
trace takes at any length. A row in which everything is hidden gives finite values.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

_HIDDEN = -1e30  # not infinity: the difference of two hidden scores must not be NaN
_TOGETHER = 4
Partial = tuple[Tensor, Tensor, Tensor]  # the rows' maximum, the sum of exp(score - maximum), the values summed so


def blockwise(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, block: int, causal: bool) -> Tensor:
    """Exact attention with a running maximum and sum: at any length memory for `block` x `block` scores only.

    With m the maximum of a row so far, s the sum of exp(score - m) and o the values summed with the same weights, a
    new block with maximum m' scales both by exp(m - max(m, m')) before its own are added; o / s is the softmax's.
    Source: Rabe and Staats, "Self-attention does not need O(n^2) memory", 2021, section 2; Dao et al.,
    "FlashAttention", NeurIPS 2022, algorithm 1. In a trace the loop goes over keys only, for all queries at once.
    """
    queries, keys = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
    if mask is None:
        mask = torch.zeros_like(keys, dtype=q.dtype)[None, None, None]
    if tracing():
        blocks = torch._shape_as_tensor(keys)[0].add(block - 1).div(block, rounding_mode="floor")
        traced: Tensor = _scripted()(q * scale, k, v, mask, queries, keys, blocks, block, causal)
        return traced
    outputs = q.new_empty((*q.shape[:3], v.shape[-1]))
    for start in range(0, q.shape[2], block):
        stop = min(start + block, q.shape[2])
        rows = mask if mask.shape[2] == 1 else mask[:, :, start:stop]
        blocks = torch.tensor(-(-(min(stop, k.shape[2]) if causal else k.shape[2]) // block))
        part, own = q[:, :, start:stop] * scale, queries[start:stop]
        outputs[:, :, start:stop] = _over_keys(part, k, v, rows, own, keys, blocks, block, causal)
    return outputs


def tracing() -> bool:
    """Whether torch.jit.trace is watching, which would write sizes and loops down as they are in this one call."""
    return torch._C._get_tracing_state() is not None


def _over_keys(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, own: Tensor, keys: Tensor, blocks: Tensor, block: int, causal: bool
) -> Tensor:
    """Attention of scaled queries to `blocks` blocks of keys in turn; `own` [n, 1] and `keys` [m] are positions.

    Also compiled by torch.jit.script, which would fix every size that is asked for here: so none is.
    """
    hidden = -1e30
    top = q[..., :1] * 0.0 + hidden
    total = q[..., :1] * 0.0
    mixed = total * v[:, :, :1]
    for index in range(int(blocks)):
        first = index * block
        last = first + block
        scores = q @ k[:, :, first:last].transpose(-2, -1) + mask[:, :, :, first:last].clamp(min=hidden)
        if causal:
            scores = scores.masked_fill(keys[first:last] > own, hidden)
        now = torch.maximum(top, scores.amax(dim=-1, keepdim=True))
        weights = torch.exp(scores - now)
        shrink = torch.exp(top - now)
        total = total * shrink + weights.sum(dim=-1, keepdim=True)
        mixed = mixed * shrink + weights @ v[:, :, first:last]
        top = now
    return mixed / total


@cache
def _scripted() -> Callable[..., Tensor]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")  # deprecated; a trace needs it for its loop
        compiled: Callable[..., Tensor] = torch.jit.script(_over_keys)
        return compiled


def sparse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int, stride: int, globals_: int,
    causal: bool,
) -> Tensor:  # fmt: skip
    """Attention of each token to those at most `window` away, to strided blocks, and to and from the first tokens.

    Only blocks of `window` tokens that hold something are computed: three for each block of queries, so that time and
    memory grow with n. With `stride` a block also sees every stride-th block from itself on, n / stride keys for each
    query; the first `globals_` tokens see and are seen by all.
    Source: Beltagy, Peters, Cohan, "Longformer", 2020, section 3.1; strided: Child et al., "Generating long sequences
    with sparse transformers", 2019, section 4.2, with blocks in the place of single positions.
    """
    parts = [_band(q, k, v, mask, scale, window, globals_, causal)]
    if stride:
        parts.append(_strided(q, k, v, mask, scale, window, stride, globals_, causal))
    if globals_:
        parts.append(_dense(q, k[:, :, :globals_], v[:, :, :globals_], _cut(mask, globals_), scale, causal))
    mixed = _merge(parts)
    if globals_:
        rows = mask if mask is None or mask.shape[2] == 1 else mask[:, :, :globals_]
        mixed = torch.cat([_merge([_dense(q[:, :, :globals_], k, v, rows, scale, causal)]), mixed[:, :, globals_:]], 2)
    return mixed


def allowed(tokens: int, window: int, stride: int, globals_: int, causal: bool) -> Tensor:
    """The pattern of `sparse` as a bool matrix [tokens, tokens], True where a query sees a key."""
    at = torch.arange(tokens)
    seen = (at[:, None] - at[None]).abs() <= window
    if stride:
        seen |= (at[:, None] // window - at[None] // window) % stride == 0
    seen |= (at[:, None] < globals_) | (at[None] < globals_)
    return seen & (at[None] <= at[:, None]) if causal else seen


def _merge(parts: list[Partial]) -> Tensor:
    """One softmax over disjoint sets of keys."""
    top = parts[0][0]
    for part in parts[1:]:
        top = torch.maximum(top, part[0])
    totals = [total * torch.exp(own - top) for own, total, _ in parts]
    mixed = [value * torch.exp(own - top) for own, _, value in parts]
    return torch.stack(mixed).sum(0) / torch.stack(totals).sum(0)


def _partial(scores: Tensor, v: Tensor) -> Partial:
    top = scores.amax(dim=-1, keepdim=True)
    weights = torch.exp(scores - top)
    return top, weights.sum(dim=-1, keepdim=True), weights @ v


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Partial:
    """The first queries and keys with one another."""
    scores = (q * scale) @ k.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask.clamp(min=_HIDDEN)
    if causal:
        scores = scores.masked_fill(torch.arange(k.shape[2])[None] > torch.arange(q.shape[2])[:, None], _HIDDEN)
    return _partial(scores, v)


def _band(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int, globals_: int, causal: bool
) -> Partial:
    """Keys at most `window` away, past the first `globals_`: each block of queries with its neighbours."""
    tokens = q.shape[2]
    extra = (-tokens) % window
    after = 0 if causal else window
    blocks = (tokens + extra) // window
    queries = pad(q * scale, (0, 0, 0, extra)).unflatten(2, (-1, window))
    keys, values = (_neighbours(pad(x, (0, 0, window, extra + after)), window, causal) for x in (k, v))
    # Who is near is the same in every block, and which keys there are the same for every query of one.
    own, beside = torch.arange(window)[:, None], torch.arange(2 * window + after) - window
    near = (own - beside).abs() <= window  # [window, 2 or 3 windows]
    if causal:
        near = near & (beside <= own)
    other = torch.arange(blocks)[:, None, None] * window + beside  # [blocks, 1, 2 or 3 windows]
    there = (other >= globals_) & (other < tokens)
    added = None if mask is None else _band_mask(mask.clamp(min=_HIDDEN), other, window, extra, after)

    def some(which: slice) -> Partial:
        hidden = ~(near & there[which])
        scores = (queries[:, :, which] @ keys[:, :, which].transpose(-2, -1)).masked_fill(hidden, _HIDDEN)
        if added is not None:
            scores = (scores + added[:, :, which]).clamp(min=_HIDDEN)
        return _partial(scores, values[:, :, which])

    # A few blocks at a time stay in the processor's cache; a trace would write their number down, and takes all.
    pieces = [slice(None)] if tracing() else [slice(i, i + _TOGETHER) for i in range(0, blocks, _TOGETHER)]
    parts = list(zip(*(some(which) for which in pieces), strict=True))
    # what is padding beyond the last token is cut; rows that see nothing count for nothing in the merge
    top, total, mixed = (torch.cat(part, dim=2).flatten(2, 3)[:, :, :tokens] for part in parts)
    return top, total, mixed


def _neighbours(padded: Tensor, window: int, causal: bool) -> Tensor:
    """[batch, heads, blocks, 2 or 3 windows, d] of keys with a window of padding before and, if not causal, after."""
    cut = padded.unflatten(2, (-1, window))
    parts = [cut[:, :, :-1], cut[:, :, 1:]] if causal else [cut[:, :, :-2], cut[:, :, 1:-1], cut[:, :, 2:]]
    return torch.cat(parts, dim=3)


def _band_mask(mask: Tensor, other: Tensor, window: int, extra: int, after: int) -> Tensor:
    """The mask at the keys `other` [blocks, 1, keys] of each block of queries."""
    padded = pad(mask, (window, extra + after))
    if mask.shape[2] == 1:
        return _neighbours(padded.transpose(-2, -1), window, after == 0).transpose(-2, -1)
    rows = pad(padded, (0, 0, 0, extra)).unflatten(2, (-1, window))
    at = (other + window).expand(*rows.shape[:4], other.shape[-1])
    picked: Tensor = rows.gather(-1, at)
    return picked


def _strided(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, window: int, stride: int, globals_: int,
    causal: bool,
) -> Partial:  # fmt: skip
    """Keys of the same block modulo `stride`, without those that the band and the first tokens have."""
    tokens = q.shape[2]
    extra = (-tokens) % (window * stride)

    def classes(x: Tensor) -> Tensor:  # [batch, heads, stride, rest, d]
        cut = pad(x, (0, 0, 0, extra)).unflatten(2, (-1, stride, window))
        grouped: Tensor = cut.transpose(2, 3).flatten(3, 4)
        return grouped

    at = torch.arange(tokens + extra).unflatten(0, (-1, stride, window)).transpose(0, 1).flatten(1)
    own, other = at[:, :, None], at[:, None, :]
    seen = (other >= globals_) & (other < tokens) & ((own - other).abs() > window)
    if causal:
        seen = seen & (other <= own)
    scores = (classes(q * scale) @ classes(k).transpose(-2, -1)).masked_fill(~seen, _HIDDEN)
    if mask is not None:
        scores = scores + _class_mask(mask.clamp(min=_HIDDEN), at, extra)
    parts = _partial(scores.clamp(min=_HIDDEN), classes(v))

    def tokens_again(x: Tensor) -> Tensor:
        inner: Tensor = x.unflatten(3, (-1, window))
        return inner.transpose(2, 3).flatten(2, 4)[:, :, :tokens]

    top, total, mixed = (tokens_again(x) for x in parts)
    return top, total, mixed


def _class_mask(mask: Tensor, at: Tensor, extra: int) -> Tensor:
    """The mask [.., n or 1, m] at the positions `at` [stride, rest] of every class: [.., stride, rest or 1, rest]."""
    padded = pad(mask, (0, extra))
    if mask.shape[2] == 1:
        return padded[:, :, 0][:, :, at].unsqueeze(3)
    rows = pad(padded, (0, 0, 0, extra))[:, :, at]  # [.., stride, rest, m]
    return rows.gather(-1, at[:, None, :].expand(*rows.shape[:4], at.shape[1]))


def _cut(mask: Tensor | None, keys: int) -> Tensor | None:
    return None if mask is None else mask[..., :keys]

"""The layers of a block in turn: those that read one tensor are changed before the next are looked at.

    turns = Turns()
    for block in walk_blocks(source, chosen, samples):
        with turns.finishing(block):
            for totals in turns.totals(block):          # {layer: Total}, one Total for all layers of the turn
                ...                                     # give these layers other weights

Each layer makes good for what those before it have lost. The calls wait before the layers that come next, so the block
runs once for every sample (`paused`). Where that would hold too much or take too many threads, or where layers run
several times in a call, each turn runs the block anew, to where it has seen enough.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, Moments, Stage, Total, check_finite, paired_moments
from deploytool.compress.calls import leaves
from deploytool.compress.matrices import gram, matrix, rows
from deploytool.compress.paused import LARGE, Paused, forward, own
from deploytool.errors import InputRefused
from deploytool.load.memory import drop_pages, give_back, on_disk

_MOST = 2**29  # bytes that all calls of a block together may hold where they wait
_MOST_THREADS = 2**11  # of all calls together: each computes with as many as the process may
_TOGETHER = 4  # calls whose rows are multiplied at once: long products are quicker


class Turns:
    """See the module's docstring. One object for a walk: it remembers which kinds of blocks may wait.

    precision  of the products: "float32", "bfloat16", or "auto", which is bfloat16 where the processor computes in it
    """

    def __init__(self, precision: str = "float32") -> None:
        self.low = precision == "bfloat16" or (precision == "auto" and _computes_bfloat16())
        self._written: dict[tuple[object, ...], list[int] | None] = {}

    def totals(self, block: Block) -> Iterator[dict[str, Total]]:
        """{layer: Total of `gram`} of every turn's layers, as `Block.accumulate` has it, in the order they read."""
        stages = block.stages()
        written = self._may_wait(block, stages)
        if written is None:
            for stage in stages:
                yield block.accumulate(gram, stage.layers, once=stage.once)
            return
        with Paused(block.module, block.calls, block.layers, written, low=self.low) as paused:
            for stage in stages:
                first = block.layers[stage.layers[0]]
                total = self._summed([rows(first, x) for x in paused.reach(stage.layers)])
                give_back()
                check_finite({stage.layers[0]: total.sum})
                yield dict.fromkeys(stage.layers, total)
                del total
                give_back()
                paused.release(stage.layers)
            block.given = list(paused.outputs())
            _refuse_again(paused.again)

    def moments(self, before: Block, now: Block) -> Iterator[dict[str, Moments]]:
        """{layer: Moments} of every turn's layers, of two like blocks, as `paired_moments` has it."""
        stages = now.stages()
        written = self._may_wait(now, stages)
        if written is None:
            for stage in stages:
                yield paired_moments(before, now, stage.layers, once=stage.once)
            return
        with (Paused(before.module, before.calls, before.layers, written, low=self.low) as old,
              Paused(now.module, now.calls, now.layers, written, low=self.low) as new):  # fmt: skip
            for stage in stages:
                first = now.layers[stage.layers[0]]
                x0, x = ([rows(first, x) for x in calls.reach(stage.layers)] for calls in (old, new))
                both = self._paired(x0, x)
                del x0, x
                give_back()
                check_finite({stage.layers[0]: both.cross + both.gram})
                yield dict.fromkeys(stage.layers, both)
                old.release(stage.layers)
                new.release(stage.layers)
            before.given, now.given = list(old.outputs()), list(new.outputs())
            _refuse_again(old.again | new.again)

    @property
    def precision(self) -> str:
        """For the report: what "auto" has come to."""
        return "bfloat16" if self.low else "float32"

    @contextmanager
    def finishing(self, block: Block) -> Iterator[None]:
        """At the end the weights of the block's layers lie on disk, and so do those that they had, if they came from
        there: memory holds one block."""
        before = [layer.get_parameter("weight").detach() for layer in block.layers.values()]
        yield
        for layer, old in zip(block.layers.values(), before, strict=True):
            new = layer.get_parameter("weight")
            if new.data_ptr() != old.data_ptr():
                layer.register_parameter("weight", nn.Parameter(on_disk(new.detach()), requires_grad=False))
        drop_pages(before)
        del before
        give_back()

    def _summed(self, parts: Sequence[Tensor]) -> Total:
        rows, total = _Rows(low=self.low), None
        for start in range(0, len(parts), _TOGETHER):
            x = rows.varying(_taken(parts[start : start + _TOGETHER]))
            total = _plus(total, gram(x))
            del x
        return Total(_whole(total, rows, rows), rows.count)

    def _paired(self, before: Sequence[Tensor], now: Sequence[Tensor]) -> Moments:
        rows0, rows = _Rows(low=self.low), _Rows(low=self.low)
        own, cross = None, None
        for start in range(0, len(now), _TOGETHER):
            parts = (_taken(parts[start : start + _TOGETHER]) for parts in (before, now))
            x0, x = (side.varying(part) for side, part in zip((rows0, rows), parts, strict=True))
            own, cross = _plus(own, gram(x)), _plus(cross, x0.T @ x)
        return Moments(_whole(own, rows, rows), _whole(cross, rows0, rows), rows.count)

    def _may_wait(self, block: Block, stages: Sequence[Stage]) -> list[int] | None:
        """Which leaves of a call the block writes into, or None where its calls cannot wait side by side.

        Proved on two calls, once for a kind of block: a module that keeps something of its own during a call would mix
        them up.
        """
        if not all(stage.once for stage in stages) or len(block.calls) * torch.get_num_threads() > _MOST_THREADS:
            return None
        shapes = (matrix(layer).shape for layer in block.layers.values())
        kind = (type(block.module), len(leaves(block.calls[0])), *shapes)
        if kind not in self._written:
            self._written[kind] = _prove(block, stages, low=self.low)
        return self._written[kind]


def _taken(parts: Sequence[Tensor]) -> Tensor:
    """The rows of all, a copy; what lies on disk is not held twice."""
    x = torch.cat(list(parts))
    drop_pages(part for part in parts if part.nbytes >= LARGE)
    return x


def _refuse_again(names: set[str]) -> None:
    """The largest call ran every layer once, and so must the others: a part of what is read would not count."""
    if names:
        raise InputRefused("DT303", "a layer must run once on every calibration sample, or several times on the largest"
                           f" (got {min(names)}, several times on another one)",
                           fix="exclude the layer, or leave out the samples")  # fmt: skip


class _Rows:
    """Rows [n, in] that come in parts, as they are multiplied: with `low` in bfloat16, and without a mean.

    A product of the mean, the first part's, would be rounded to more than what distinguishes the rows; `_whole` adds it
    afterwards.
    """

    def __init__(self, *, low: bool) -> None:
        self.low, self.count = low, 0
        self.mean: Tensor | None = None  # [in]
        self.rest: Tensor | float = 0.0  # [in], float64: the sum of what is multiplied, as it is rounded

    def varying(self, x: Tensor) -> Tensor:
        """The part X as it is multiplied; X itself may be changed."""
        self.count += len(x)
        if not self.low:
            return x
        if self.mean is None:
            self.mean = x.mean(dim=0, dtype=torch.float32)
        off = x.sub_(self.mean).bfloat16()
        self.rest = off.sum(dim=0, dtype=torch.float32).double() + self.rest
        return off


def _whole(varying: Tensor | None, first: _Rows, second: _Rows) -> Tensor:
    """X0^T X [in, in] of all rows from the product of what varies, float64, which is changed; symmetric where that is.

    (1 m0^T + R0)^T (1 m^T + R) = R0^T R + m0 r^T + r0 m^T + n m0 m^T  with the sums r of what varies
    """
    if varying is None:
        raise AssertionError("a stage is what the largest call reads")
    if first.mean is None or second.mean is None:
        return varying
    mean0, mean = first.mean.double(), second.mean.double()
    half0, half = (side.count / 2 * m + side.rest for side, m in ((first, mean0), (second, mean)))
    return varying.add_(torch.outer(mean0, half).add_(torch.outer(half0, mean)))


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    """Their sum in float64."""
    return value.double() if total is None else total.add_(value)


def _computes_bfloat16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _prove(block: Block, stages: Sequence[Stage], *, low: bool) -> list[int] | None:
    largest = block.largest()
    other = block.calls[0 if block.calls[-1] is largest else -1]
    call = own(largest, range(len(leaves(largest))))
    versions = [leaf._version if isinstance(leaf, Tensor) else 0 for leaf in leaves(call)]
    expected = leaves(forward(block.module, call, low=low))
    written = [i for i, leaf in enumerate(leaves(call)) if isinstance(leaf, Tensor) and leaf._version != versions[i]]
    held = sum(_bytes(leaf) for leaf in leaves(call))
    with Paused(block.module, [largest, other], block.layers, written, low=low) as paused:
        for stage in stages:
            held += sum(_bytes(x) for x in paused.reach(stage.layers)[:1])
            paused.release(stage.layers)
        given = leaves(next(paused.outputs()))
    held += sum(map(_bytes, given))
    same = len(given) == len(expected) and all(_equal(a, b) for a, b in zip(given, expected, strict=True))
    return written if same and held * len(block.calls) <= _MOST else None


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, Tensor) and isinstance(two, Tensor) else type(one) is type(two)


def _bytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0

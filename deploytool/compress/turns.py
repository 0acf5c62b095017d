"""The layers of a block in turn: those that read one tensor are changed before the next are looked at.

    turns = Turns()
    for block in walk_blocks(source, chosen, samples):
        with turns.finishing(block):
            for totals in turns.totals(block):          # {layer: Total}, one Total for all layers of the turn
                ...                                     # give these layers other weights

Each layer makes good for what those before it have lost. Each turn runs the block to the layers that come next; those
that are done are computed once for each sample (`passes`). Where layers run several times in a call, each turn computes
the block anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, Moments, Total, check_finite, paired_moments
from deploytool.compress.matrices import gram, rows
from deploytool.compress.passes import Passes
from deploytool.compress.shelf import Shelf
from deploytool.errors import InputRefused
from deploytool.load.memory import drop_pages, give_back, on_disk

_TOGETHER = 4  # calls whose rows are multiplied at once: long products are quicker


class Turns:
    """See the module's docstring.

    precision  of the products: "float32", "bfloat16", or "auto", which is bfloat16 where the processor computes in it
    """

    def __init__(self, precision: str = "float32") -> None:
        self.low = precision == "bfloat16" or (precision == "auto" and _computes_bfloat16())

    def totals(self, block: Block) -> Iterator[dict[str, Total]]:
        """{layer: Total of `gram`} of every turn's layers, as `Block.accumulate` has it, in the order they read."""
        stages = block.stages()
        if not all(stage.once for stage in stages):
            for stage in stages:
                yield block.accumulate(gram, stage.layers, once=stage.once)
            return
        with self._passes(block) as passes:
            for stage in stages:
                first = block.layers[stage.layers[0]]
                total = self._summed(rows(first, x) for x in passes.reach(stage.layers))
                give_back()
                check_finite({stage.layers[0]: total.sum})
                yield dict.fromkeys(stage.layers, total)
                del total
                give_back()
                passes.release(stage.layers)
            block.given = Shelf(passes.outputs(), expected=len(block.calls))
            _refuse_again(passes.again)

    def moments(self, before: Block, now: Block) -> Iterator[dict[str, Moments]]:
        """{layer: Moments} of every turn's layers, of two like blocks, as `paired_moments` has it."""
        stages = now.stages()
        if not all(stage.once for stage in stages):
            for stage in stages:
                yield paired_moments(before, now, stage.layers, once=stage.once)
            return
        with self._passes(before) as old, self._passes(now) as new:
            for stage in stages:
                first = now.layers[stage.layers[0]]
                both = self._paired(*((rows(first, x) for x in passes.reach(stage.layers)) for passes in (old, new)))
                give_back()
                check_finite({stage.layers[0]: both.cross + both.gram})
                yield dict.fromkeys(stage.layers, both)
                old.release(stage.layers)
                new.release(stage.layers)
            for block, passes in ((before, old), (now, new)):
                block.given = Shelf(passes.outputs(), expected=len(block.calls))
            _refuse_again(old.again | new.again)

    def _passes(self, block: Block) -> Passes:
        return Passes(block.module, block.calls, block.layers, low=self.low)

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

    def _summed(self, parts: Iterable[Tensor]) -> Total:
        rows, total = _Rows(low=self.low), None
        for x in map(rows.varying, _joined(parts)):
            total = _plus(total, gram(x))
        return Total(_whole(total, rows, rows), rows.count)

    def _paired(self, before: Iterable[Tensor], now: Iterable[Tensor]) -> Moments:
        rows0, rows = _Rows(low=self.low), _Rows(low=self.low)
        own, cross = None, None
        for x0, x in zip(map(rows0.varying, _joined(before)), map(rows.varying, _joined(now)), strict=True):
            own, cross = _plus(own, gram(x)), _plus(cross, x0.T @ x)
        return Moments(_whole(own, rows, rows), _whole(cross, rows0, rows), rows.count)


def _joined(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of a few parts at a time, copies."""
    left = iter(parts)
    while some := list(islice(left, _TOGETHER)):
        yield torch.cat(some)


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

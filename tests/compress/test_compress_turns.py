"""Layers in turn: passes that take from the shelf what is done give what passes that compute all of it give."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from deploytool.compress import shelf as shelf_module
from deploytool.compress.blocks import Block, Total, paired_moments, walk_blocks
from deploytool.compress.calls import leaves, replay
from deploytool.compress.matrices import gram, matrix, matrix_layers, set_matrix
from deploytool.compress.passes import Passes, forward
from deploytool.compress.turns import Turns
from deploytool.errors import InputRefused
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(*(t.unsqueeze(1) for t in (q, k, v))).squeeze(1)


class _Block(nn.Module):
    """`keeps`: something of a call is kept in the module until its end; `writes`: the input is written into;
    `attends`: the tokens look at one another."""

    def __init__(self, width: int = 6, *, keeps: bool = False, writes: bool = False, attends: bool = False):
        super().__init__()
        self.q, self.k, self.down = (nn.Linear(width, width) for _ in range(3))
        self.keeps, self.writes, self.attends = keeps, writes, attends
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x
        y = torch.tanh(self.q(x)) * self.k(x)
        y = _attend(y, y, y) if self.attends else y
        rest = self.kept if self.keeps else x
        out = rest + self.down(y)
        return x.copy_(out) if self.writes else out


class _Chain(nn.Module):
    def __init__(self, depth: int = 3, **kind: bool):
        super().__init__()
        self.embed, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.layers = nn.ModuleList(_Block(**kind) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def _source(tiny: Source, module: nn.Module, count: int = 7) -> Source:
    generator = torch.Generator().manual_seed(5)
    samples = [{"x": torch.randn(2, 7, 5, generator=generator)} for _ in range(count)]
    x = dataclasses.replace(tiny.signature.inputs[0], name="x", dtype="float32", shape=(2, 7, 5))
    y = dataclasses.replace(tiny.signature.outputs[0], name="output", shape=("batch",))
    signature = dataclasses.replace(tiny.signature, inputs=(x,), outputs=(y,))
    return with_module(dataclasses.replace(tiny, signature=signature, samples=lambda: iter(samples)), module)


def _chain(tiny: Source, **kind: bool) -> Source:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _source(tiny, _Chain(**kind))


class _Anew(Turns):
    """Each turn computes the whole block."""

    def totals(self, block: Block) -> Iterator[dict[str, Total]]:
        for stage in block.stages():
            yield block.accumulate(gram, stage.layers, once=stage.once)


def _walked(
    source: Source, precision: str = "float32", kind: type[Turns] = Turns
) -> tuple[list[tuple[str, Tensor, int]], list[Tensor], Turns]:
    """What every turn saw, with the layers changed as they were met, and the weights in the end."""
    names = [name for name in matrix_layers(source.module)[0] if "layers" in name]
    seen, turns = [], kind(precision)
    for block in walk_blocks(source, names, list(source.samples())):
        for totals in turns.totals(block):
            for name, total in totals.items():
                seen.append((name, total.sum.clone(), total.rows))
                matrix(block.layers[name]).mul_(1 - 0.01 * float(total.sum.diagonal().mean().clamp(max=30)))
    return seen, [p.clone() for p in source.module.parameters()], turns


_KINDS = [{}, {"writes": True}, {"keeps": True}, {"attends": True}]


@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_kept_gives_what_is_computed_anew(tiny: Source, kind: dict[str, bool]) -> None:
    """The sums of all turns, and the weights that follow from them, must not depend on how the block is run."""
    kept, weights, _ = _walked(_chain(tiny, **kind))
    again, others, _ = _walked(_chain(tiny, **kind), kind=_Anew)
    assert [name for name, _, _ in kept] == [f"layers.{i}.{n}" for i in range(3) for n in ("q", "k", "down")]
    for (name, one, count), (other_name, other, other_count) in zip(kept, again, strict=True):
        assert (name, count) == (other_name, other_count) == (name, 7 * 2 * 7)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weights, others, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", _KINDS)
def test_what_lies_on_disk_is_the_same(tiny: Source, monkeypatch: pytest.MonkeyPatch, kind: dict[str, bool]) -> None:
    """What has no place in memory must give what it gives there, bit by bit."""
    in_memory, weights, _ = _walked(_chain(tiny, **kind))
    written: list[int] = []
    right = shelf_module._write
    monkeypatch.setattr(shelf_module, "_write", lambda *given: written.append(1) or right(*given))
    monkeypatch.setattr(shelf_module, "_IN_MEMORY", 0)
    on_disk, others, _ = _walked(_chain(tiny, **kind))
    assert len(written) > 3 * 6 * 2  # of three blocks at least the inputs and outputs of all calls but the first
    assert [(name, total.tolist(), rows) for name, total, rows in on_disk] == [
        (name, total.tolist(), rows) for name, total, rows in in_memory
    ]
    assert all(torch.equal(one, two) for one, two in zip(weights, others, strict=True))


class _Computed(TorchDispatchMode):
    """Counts what is computed, by the operators' names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def test_what_is_done_is_computed_once(tiny: Source) -> None:
    """Each layer and each attention must be computed once for a call, however many turns follow, and once to look."""
    source = _chain(tiny, attends=True)
    block = next(walk_blocks(source, [f"layers.0.{n}" for n in ("q", "k", "down")], list(source.samples())))
    with _Computed() as computed:
        list(Turns().totals(block))
    attended = {name: count for name, count in computed.counts.items() if "scaled_dot_product" in name}
    assert list(attended.values()) == [8] and computed.counts["aten.addmm"] == 3 * 8
    assert not any("forward" in layer.__dict__ for layer in block.layers.values())


def test_two_walks_are_bit_identical(tiny: Source) -> None:
    """The same samples must give the same weights."""
    one, two = (_walked(_chain(tiny)) for _ in range(2))
    assert all(torch.equal(a[1], b[1]) for a, b in zip(one[0], two[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(one[1], two[1], strict=True))


def test_pairs_are_kept_side_by_side(tiny: Source) -> None:
    """Moments with the block as it was must be the same whether what is done is kept or computed anew."""

    def walked(*, kept: bool) -> list[Tensor]:
        source = _chain(tiny)
        original = with_module(source, shell(source.module))
        changed = with_module(source, shell(source.module))
        names = [name for name in matrix_layers(source.module)[0] if "layers" in name]
        found, turns = [], Turns()
        samples = list(source.samples())
        pairs = zip(walk_blocks(changed, names, samples), walk_blocks(original, names, samples), strict=True)
        for now, before in pairs:
            anew = (paired_moments(before, now, stage.layers, once=stage.once) for stage in now.stages())
            for moments in turns.moments(before, now) if kept else anew:
                for name, both in moments.items():
                    found += [both.gram.clone(), both.cross.clone()]
                    layer = now.layers[name]
                    layer.weight = nn.Parameter(layer.weight * 0.7, requires_grad=False)  # type: ignore[operator]
        return found

    found = walked(kept=True)
    torch.testing.assert_close(found, walked(kept=False), rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[4], found[5])  # the second turn reads what the changed layers of the first give


def test_low_precision_is_near_and_outputs_stay_float32(tiny: Source) -> None:
    """In bfloat16 the sums must be those of float32 to its accuracy, and what a block gives must be float32."""
    exact, _, _ = _walked(_chain(tiny))
    low, _, turns = _walked(_chain(tiny), "bfloat16")
    assert turns.precision == "bfloat16"
    for (_, one, _), (_, other, _) in zip(exact, low, strict=True):
        assert 0 < float((one - other).norm() / one.norm()) < 0.02
    source = _chain(tiny)
    block = next(walk_blocks(source, ["layers.0.q"], list(source.samples())))
    list(Turns("bfloat16").totals(block))
    assert block.given is not None and {out.dtype for out in block.given} == {torch.float32}


def test_what_fails_in_a_pass_is_raised_and_leaves_nothing(tiny: Source) -> None:
    """An error inside a call must reach the caller, and no hook and no other forward may be left behind."""
    source = _chain(tiny)
    block = next(walk_blocks(source, ["layers.0.q", "layers.0.down"], list(source.samples())))
    with Passes(block.module, block.calls, block.layers) as passes:
        assert len(list(passes.reach(["layers.0.q"]))) == 7
        block.module.down.weight.resize_(3, 3)  # type: ignore[union-attr, operator]
        passes.release(["layers.0.q"])
        assert len(list(passes.reach(["layers.0.down"]))) == 7
        passes.release(["layers.0.down"])
        with pytest.raises(RuntimeError):
            list(passes.outputs())
    assert not any(layer._forward_pre_hooks or "forward" in layer.__dict__ for layer in block.layers.values())


class _InParts(nn.Module):
    """Takes what is long, or as `often` says, in parts of four rows."""

    def __init__(self, often: Any = lambda x: len(x) > 4) -> None:
        super().__init__()
        self.a, self.b, self.often = nn.Linear(6, 6), nn.Linear(6, 6), often

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(4) if self.often(x) else (x,)
        return x + self.b(torch.cat([torch.tanh(self.a(part)) for part in parts]))


def _in_parts(*often: Any) -> Block:
    module = _InParts(*often).requires_grad_(False)
    calls: list[Any] = [((torch.randn(rows, 6),), {}) for rows in (3, 4, 12, 8)]
    return Block("block", module, {"a": module.a, "b": module.b}, calls)


def test_rows_of_layers_that_run_several_times_on_long_samples_all_count() -> None:
    """That the first sample runs a layer once must not hide what the others give it."""
    rows = {name: total.rows for totals in Turns().totals(_in_parts()) for name, total in totals.items()}
    assert rows == {"a": 27, "b": 27}


def test_layers_that_run_several_times_on_a_shorter_sample_are_refused() -> None:
    """What nobody saw must not be left out in silence."""
    with pytest.raises(InputRefused, match="got a, several times"):
        list(Turns().totals(_in_parts(lambda x: len(x) == 8)))


def test_sums_that_are_not_finite_are_refused(tiny: Source) -> None:
    """A layer that overflows must be named, as everywhere."""
    source = _chain(tiny)
    matrix(source.module.layers[0].q).fill_(torch.inf)  # type: ignore[index, union-attr]
    block = next(walk_blocks(source, ["layers.0.q", "layers.0.down"], list(source.samples())))
    with pytest.raises(InputRefused, match=r"layers\.0\.down"):
        list(Turns().totals(block))


def test_outputs_of_passes_are_those_of_the_changed_block(tiny: Source) -> None:
    """`given` must be what the block gives as it was left."""
    source = _chain(tiny)
    block: Block = next(walk_blocks(source, ["layers.0.q", "layers.0.down"], list(source.samples())))
    for totals in Turns().totals(block):
        for name in totals:
            matrix(block.layers[name]).mul_(0.5)
    assert block.given is not None
    for call, given in zip(block.calls, block.given, strict=True):
        assert torch.equal(leaves(replay(block.module, call))[0], given)


def test_finished_weights_lie_on_disk(tiny: Source) -> None:
    """Where Linux maps files, a changed weight must lie on disk when its block is done, unless it is small."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 300), nn.Linear(300, 300), nn.Linear(300, 5))
                                        for _ in range(2))  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            for block in self.layers:
                x = block(x)
            return x

    source, turns, wanted = _source(tiny, Wide()), Turns(), {}
    names = [name for name in matrix_layers(source.module)[0] if name.endswith("1")]
    for block in walk_blocks(source, names, list(source.samples())):
        with turns.finishing(block):
            for totals in turns.totals(block):
                for name in totals:
                    wanted[name] = matrix(block.layers[name]) * 0.5
                    set_matrix(block.layers[name], wanted[name])
    for name, value in wanted.items():
        weight = source.module.get_submodule(name).get_parameter("weight")
        assert torch.equal(weight, value) and (weight.data_ptr() != value.data_ptr() or sys.platform != "linux")
    assert len(wanted) == 2


def test_rows_with_a_strong_mean_keep_their_differences_in_low_precision() -> None:
    """Nearly equal rows must give a symmetric matrix whose small directions are those of float64, however they come."""
    generator = torch.Generator().manual_seed(0)
    parts = [50 + torch.randn(512, 40, generator=generator) for _ in range(6)]
    x, turns = torch.cat(parts).double(), Turns("bfloat16")
    exact = x.T @ x
    low = turns._summed(parts)
    both = turns._paired(parts, [2 * part for part in parts])
    assert low.rows == both.rows == 3072 and torch.equal(low.sum, low.sum.T)
    small, found = torch.linalg.eigvalsh(exact)[:-1], torch.linalg.eigvalsh(low.sum)[:-1]
    torch.testing.assert_close(found, small, rtol=0.02, atol=0)
    torch.testing.assert_close(both.cross, 2 * exact, rtol=1e-4, atol=0)
    torch.testing.assert_close(both.gram, 4 * exact, rtol=1e-4, atol=0)


def test_low_precision_casts_the_changed_weights_once(tiny: Source) -> None:
    """Autocast must keep copies of the weights that are done with, give what it gives without, and leave no trace."""
    source, turns, seen = _chain(tiny), Turns("bfloat16"), 0
    for block in walk_blocks(source, [n for n in matrix_layers(source.module)[0] if "layers" in n],
                             list(source.samples())):  # fmt: skip
        done: list[str] = []
        for totals in turns.totals(block):
            assert all(block.layers[name].get_parameter("weight").requires_grad for name in done)
            seen += len(done)
            for name in totals:
                set_matrix(block.layers[name], matrix(block.layers[name]) * 0.5)
            done += totals
        assert block.given is not None
        assert not any(layer.get_parameter("weight").requires_grad for layer in block.layers.values())
        for call, given in zip(block.calls, block.given, strict=True):
            assert torch.equal(forward(block.module, call, low=True), given)
    assert seen == 6

"""Calibration block by block: found by structure, fed by what came before, sums exact and shared."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.blocks import find_blocks, walk_blocks
from deploytool.compress.calls import leaves, sharing_equal
from deploytool.compress.chain import trace
from deploytool.compress.matrices import gram, matrix, matrix_layers, rows, squares
from deploytool.errors import InputRefused
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import with_module
from deploytool.source import Source


class _Cache:
    """What a decoder keeps of earlier calls: changed in place."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class _Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.down = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Any:
        if cache is not None:
            assert not cache.kept, "a replayed call must find the cache as it was"
            cache.kept.append(x)
        y = torch.tanh(self.q(x)) * self.k(x)
        return (x + self.down(y if mask is None else y * mask), None)


class _Chain(nn.Module):
    """`style`: what stands between the blocks: nothing, a function of the hidden state, or another mask per block."""

    def __init__(self, style: str = "plain", depth: int = 4, width: int = 6):
        super().__init__()
        self.embed, self.head = nn.Linear(5, width), nn.Linear(width, 3)
        self.layers = nn.ModuleList(_Block(width) for _ in range(depth))
        self.style = style

    def forward(self, x: Tensor) -> Tensor:
        x, mask = self.embed(x), torch.linspace(0.5, 1, x.shape[1])[:, None]
        cache = _Cache()
        for index, block in enumerate(self.layers):
            if self.style == "between":
                x = x * 1.5
            here = mask + index if self.style == "masks" else mask
            x, _ = block(x, mask=here, cache=None if self.style == "masks" else cache)
            cache.kept.clear()
        return self.head(x)


def _source(tiny: Source, module: nn.Module, shape: tuple[int, ...] = (2, 7, 5), count: int = 3) -> Source:
    generator = torch.Generator().manual_seed(5)
    samples = [{"x": torch.randn(*shape, generator=generator)} for _ in range(count)]
    x = dataclasses.replace(tiny.signature.inputs[0], name="x", dtype="float32", shape=shape)
    y = dataclasses.replace(tiny.signature.outputs[0], name="output", shape=("batch",))
    signature = dataclasses.replace(tiny.signature, inputs=(x,), outputs=(y,))
    return with_module(dataclasses.replace(tiny, signature=signature, samples=lambda: iter(samples)), module)


def _seen_by(module: nn.Module, layer: str, samples: list[dict[str, Tensor]]) -> Tensor:
    """What a layer reads when the whole model runs: the truth."""
    read: list[Tensor] = []
    part = module.get_submodule(layer)
    handle = part.register_forward_pre_hook(lambda m, args: read.append(rows(m, args[0].clone())))
    with torch.no_grad():
        for sample in samples:
            module(*sample.values())
    handle.remove()
    return torch.cat(read)


@pytest.mark.parametrize("style", ["plain", "between", "masks"])
def test_every_block_sees_what_the_changed_model_gives_it(tiny: Source, style: str) -> None:
    """With each block changed as it is met, the next one's Gram matrix must be that of the whole changed model."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        source = _source(tiny, _Chain(style))
    samples = list(source.samples())
    layers, _ = matrix_layers(source.module)
    met = []
    for block in walk_blocks(source, layers, samples):
        met.append(block.name)
        totals = block.accumulate(gram)
        assert list(totals) == list(block.layers)
        for name, total in totals.items():
            truth = _seen_by(source.module, name, samples).double()
            torch.testing.assert_close(total.sum, truth.T @ truth, rtol=1e-5, atol=1e-5)
            assert total.rows == len(truth) == 3 * 2 * 7
            assert torch.equal(total.sum, total.sum.T)
        for layer in block.layers.values():
            matrix(layer).mul_(0.7)
    assert met == ["embed", "layers.0", "layers.1", "layers.2", "layers.3", "head"]


@pytest.mark.parametrize("style", ["plain", "masks"])
def test_stages_are_what_reads_one_tensor_in_order(tiny: Source, style: str) -> None:
    """Layers of one tensor must form a stage, and the next stage's sums, cut short or not, see the changed ones."""
    source = _source(tiny, _Chain(style))
    samples = list(source.samples())
    layers, _ = matrix_layers(source.module)
    for block in walk_blocks(source, [name for name in layers if "layers" in name], samples):
        stages = block.stages()
        assert [stage.layers for stage in stages] == [(f"{block.name}.q", f"{block.name}.k"), (f"{block.name}.down",)]
        for stage in stages:
            assert stage.once
            full, cut = (block.accumulate(gram, stage.layers, once=once) for once in (False, stage.once))
            truth = _seen_by(source.module, stage.layers[0], samples).double()
            for name in stage.layers:
                torch.testing.assert_close(cut[name].sum, truth.T @ truth, rtol=1e-5, atol=1e-5)
                assert torch.equal(cut[name].sum, full[name].sum) and cut[name].rows == full[name].rows
                matrix(block.layers[name]).mul_(0.7)


def test_a_block_of_repeated_layers_is_not_cut_short(tiny: Source) -> None:
    """Where a layer runs twice in a call the stages must say so, and what only later calls reach stand last."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.late = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(self.b(self.a(x)))
            return self.late(y) if len(x) > 1 else y

    source = _source(tiny, Twice())
    samples = [{"x": torch.randn(1, 3, 5)}, {"x": torch.randn(2, 3, 5)}]
    block = next(walk_blocks(source, ["a", "b", "late"], samples))
    assert [(stage.layers, stage.once) for stage in block.stages()] == [(("a",), False), (("b",), False),
                                                                        (("late",), False)]  # fmt: skip
    assert block.accumulate(gram, ["late"])["late"].rows == 6


def test_chained_blocks_are_not_reached_through_the_model_again(tiny: Source) -> None:
    """Blocks that feed one another directly must be linked; where something lies between, they must not be."""
    for style, linked in (("plain", [False, True, True, True]), ("between", [False] * 4), ("masks", [False] * 4)):
        source = _source(tiny, _Chain(style))
        sample = next(iter(source.samples()))
        blocks = {f"layers.{i}": block for i, block in enumerate(source.module.layers)}
        order = trace(partial(source.flat, sample["x"]), blocks)
        assert [name for name, _ in order] == list(blocks)
        assert [link.before is not None for _, link in order] == linked


def test_heads_that_are_written_into_are_computed(tiny: Source) -> None:
    """Layers behind the blocks are left out where they can be; where what follows needs them the walk must go on."""

    class Writes(_Chain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).mul_(2)

    source = _source(tiny, Writes())
    walked = [block.name for block in walk_blocks(source, ["layers.0.q", "layers.1.q"], list(source.samples()))]
    assert walked == ["layers.0", "layers.1"]
    assert "forward" not in source.module.head.__dict__  # type: ignore[union-attr]


def test_a_chain_that_does_not_give_the_models_outputs_is_not_used(tiny: Source) -> None:
    """Blocks that pass something on in a shared object must be fed by runs of the whole model."""

    class Tells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Sequential(nn.Linear(5, 5))

        def forward(self, x: Tensor, told: Any) -> Tensor:
            told.kept.append(x)
            return self.up(x) * len(told.kept)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Tells() for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            told = _Cache()
            for block in self.layers:
                x = block(x, told)
            return x

    source = _source(tiny, Model())
    samples = list(source.samples())
    for block in walk_blocks(source, [f"layers.{i}.up.0" for i in range(3)], samples):
        ((name, total),) = block.accumulate(gram).items()
        truth = _seen_by(source.module, name, samples).double()
        torch.testing.assert_close(total.sum, truth.T @ truth, rtol=1e-5, atol=1e-5)


def test_layers_that_read_one_tensor_share_one_sum(tiny: Source) -> None:
    """q and k read the same tensor and must get the same object, down another."""
    source = _source(tiny, _Chain())
    block = next(walk_blocks(source, ["layers.1.q", "layers.1.k", "layers.1.down"], list(source.samples())))
    totals = block.accumulate(gram)
    assert totals["layers.1.q"] is totals["layers.1.k"] is not totals["layers.1.down"]
    diagonal = block.accumulate(squares, ["layers.1.q"])
    torch.testing.assert_close(diagonal["layers.1.q"].sum, totals["layers.1.q"].sum.diag(), rtol=1e-6, atol=0)


def test_only_chosen_blocks_are_met(tiny: Source) -> None:
    """Blocks without a chosen layer must be passed over, and the ones after them be fed rightly."""
    source = _source(tiny, _Chain())
    samples = list(source.samples())
    met = []
    for block in walk_blocks(source, ["layers.0.q", "layers.3.down"], samples):
        met.append(block.name)
        ((name, total),) = block.accumulate(gram).items()
        truth = _seen_by(source.module, name, samples).double()
        torch.testing.assert_close(total.sum, truth.T @ truth, rtol=1e-5, atol=1e-5)
        matrix(block.layers[name]).zero_()
    assert met == ["layers.0", "layers.3"]


def test_outputs_follow_the_block(tiny: Source) -> None:
    """outputs() must be those of the block as it is now, once per sample."""
    source = _source(tiny, _Chain())
    block = next(walk_blocks(source, ["layers.0.q"], list(source.samples())))
    before = [leaves(out)[0] for out in block.outputs()]
    assert len(before) == 3
    matrix(block.module.down).zero_()  # type: ignore[arg-type]
    after = [leaves(out)[0] for out in block.outputs()]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_inputs_written_to_afterwards_count_as_they_were_read(tiny: Source) -> None:
    """A tensor that is changed in place after a layer read it must enter the sum as the layer saw it."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = x * 2
            y = self.one(x)
            return y + self.two(torch.relu_(x))

    source = _source(tiny, Overwrites())
    samples = list(source.samples())
    block = next(walk_blocks(source, ["one", "two"], samples))
    assert block.name == ""
    totals = block.accumulate(gram)
    assert totals["one"] is not totals["two"]
    for name in totals:
        truth = _seen_by(source.module, name, samples).double()
        torch.testing.assert_close(totals[name].sum, truth.T @ truth, rtol=1e-5, atol=1e-5)


def test_a_block_called_twice_gets_both_calls(tiny: Source) -> None:
    """Weights that are used twice in a run must see the rows of both uses."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.layers, *self.layers):
                x = block(x)
            return x

    source = _source(tiny, Twice())
    samples = list(source.samples())
    met = []
    for block in walk_blocks(source, ["layers.0.0", "layers.1.0"], samples):
        met.append(block.name)
        ((name, total),) = block.accumulate(gram).items()
        truth = _seen_by(source.module, name, samples).double()
        assert total.rows == len(truth)
        torch.testing.assert_close(total.sum, truth.T @ truth, rtol=1e-5, atol=1e-5)
        matrix(block.layers[name]).mul_(0.5)
    assert met == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(5, 3), nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2), nn.Conv1d(4, 6, 3, padding="same"),
     nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(3, 8, (5, 3), padding="same", padding_mode="reflect")],
)  # fmt: skip
def test_rows_times_matrix_is_the_layer(layer: nn.Module) -> None:
    """X W^T of a layer's rows must be what the layer gives, bias apart: the Gram matrix is then the layer's own."""
    shape = {nn.Linear: (2, 7, 5), nn.Conv1d: (2, 4, 9), nn.Conv2d: (2, 3, 8, 9)}[type(layer)]
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        given = layer(x) - layer(torch.zeros_like(x))
        made = rows(layer, x) @ matrix(layer).T
    flat = given if isinstance(layer, nn.Linear) else given.movedim(1, -1)
    torch.testing.assert_close(made, flat.reshape(-1, flat.shape[-1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 5, 256, 300, 700])
def test_gram_is_the_product(size: int) -> None:
    """The tiled product must be X^T X and exactly symmetric."""
    x = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gram(x), x.T @ x, rtol=1e-5, atol=1e-4)
    assert torch.equal(gram(x), gram(x).T)


def test_blocks_are_found_by_structure() -> None:
    """Lists of one type with layers inside are blocks, outermost only; lists of leaves or of mixed types are not."""
    inner = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2)))
    model = nn.Module()
    model.stages = nn.ModuleList([copy.deepcopy(inner), copy.deepcopy(inner)])
    model.mixed = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    model.leaves = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_blocks(model) == ["stages.0", "stages.1"]


def test_digits_and_layers_that_are_no_matrices(tiny: Source) -> None:
    """The shipped transformer's blocks must be found; embeddings, tied heads and grouped kernels are told with why."""
    assert find_blocks(open_source(resolve("digits")).module) == [f"blocks.{i}" for i in range(4)]
    layers, skipped = matrix_layers(tiny.module)
    assert list(layers) == ["up", "down"]
    reasons = {entry["layer"]: entry["reason"] for entry in skipped}
    assert reasons["embed"] == "an embedding" and "shared with embed.weight" in reasons["head"]
    none, skipped = matrix_layers(nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.MultiheadAttention(4, 2)))
    reasons = {entry["layer"]: entry["reason"] for entry in skipped}
    assert not none and set(reasons) == {"0", "1", "1.out_proj"}
    assert "4 groups" in reasons["0"] and "neither" in reasons["1"] and "neither" in reasons["1.out_proj"]


def test_wrong_samples_are_refused(tiny: Source, tiny_samples: Callable[..., list[dict[str, Tensor]]]) -> None:
    """No samples, NaN in one, and a model that overflows must each be an error that says so."""
    source = _source(tiny, _Chain())
    with pytest.raises(InputRefused, match="at least one sample"):
        next(walk_blocks(source, ["layers.0.q"], []))
    with pytest.raises(InputRefused, match="'x' of sample 1"):
        next(walk_blocks(source, ["layers.0.q"], tiny_samples(nan_at=1)))
    source.module.embed.bias.fill_(float("nan"))
    with pytest.raises(InputRefused, match="finite activations"):
        next(walk_blocks(source, ["layers.0.q"], tiny_samples())).accumulate(gram)


@pytest.fixture
def tiny_samples() -> Callable[..., list[dict[str, Tensor]]]:
    def make(nan_at: int | None = None) -> list[dict[str, Tensor]]:
        samples = [{"x": torch.ones(1, 3, 5)} for _ in range(2)]
        if nan_at is not None:
            samples[nan_at]["x"][0, 0, 0] = float("nan")
        return samples

    return make


def test_equal_tensors_are_shared_in_every_nesting() -> None:
    """Masks that two calls have in common are held once, whatever kind of dict, list or tuple they come in."""
    kept = defaultdict(list, {"mask": torch.ones(2)})
    one = ((torch.zeros(1), [kept]), {"position": torch.arange(3)})
    two = ((torch.ones(1), [defaultdict(list, {"mask": torch.ones(2)})]), {"position": torch.arange(3)})
    (moved, [found]), named = sharing_equal(two, one)
    assert moved is two[0][0] and found["mask"] is kept["mask"] and named["position"] is one[1]["position"]
    assert isinstance(found, defaultdict) and found.default_factory is list

"""Producers found by tracing, factors folded without changing the function, AWQ and SmoothQuant on top of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.calls import Call, record_calls
from deploytool.compress.matrices import gram
from deploytool.compress.quantize.awq import apply as awq
from deploytool.compress.quantize.awq import scales, search_scale
from deploytool.compress.quantize.folding import per_class
from deploytool.compress.quantize.layers import output_error
from deploytool.compress.quantize.producers import find_links, scalable, scale_outputs
from deploytool.compress.quantize.ranges import choose
from deploytool.compress.quantize.rtn import apply as rtn
from deploytool.compress.quantize.smoothquant import apply as smooth
from deploytool.compress.quantize.smoothquant import smoothing
from deploytool.compress.quantize.tables import Awq, Rtn, SmoothQuant
from deploytool.compress.step import Calibration, Context
from deploytool.errors import UsageProblem
from deploytool.load.flat import FlatModule
from deploytool.load.grid import lies_on, snap
from deploytool.signature import Signature, TensorSpec
from deploytool.source import ModelRef, Source

WIDTH = 24


class _OnePlus(nn.Module):
    """A norm that multiplies by 1 + weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class _Gated(nn.Module):
    """A pre-norm block with grouped values and a gated product: 4 heads of 6 share 2 value heads."""

    def __init__(self, norm: type[nn.Module] | Any) -> None:
        super().__init__()
        self.first, self.second = norm(), norm()
        self.q, self.k = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.v, self.o = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 40, bias=False), nn.Linear(WIDTH, 40)
        self.down = nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        q, k = (t.view(*y.shape[:2], 4, 6).transpose(1, 2) for t in (self.q(y), self.k(y)))
        v = self.v(y).view(*y.shape[:2], 2, 6).transpose(1, 2).repeat_interleave(2, 1)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.o(mixed.transpose(1, 2).reshape(*y.shape[:2], WIDTH))
        y = self.second(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class _PostNorm(nn.Module):
    """A block whose norm also feeds the residual, and whose activation is no multiple of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return x + self.down(nn.functional.gelu(self.up(x)))


class _Relu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def _call(block: nn.Module) -> Call:
    x = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(5))
    return record_calls(lambda: block(x), block, first_only=True)[0]


def _seeded(make: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval().requires_grad_(False)


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH), _OnePlus])
def test_producers_are_found_without_names(norm: Any) -> None:
    """Norms for the layers after them, values for the output through shared heads, `up` for `down`; `gate` for none."""
    block = _seeded(lambda: _Gated(norm))
    links = {link.producer: link for link in find_links(block, _call(block))}
    assert {name: link.readers for name, link in links.items()} == {
        "first": ("q", "k", "v"), "v": ("o",), "second": ("gate", "up"), "up": ("down",),
    }  # fmt: skip
    assert links["v"].channels.tolist() == [*range(6), *range(6), *range(6, 12), *range(6, 12)]
    assert links["up"].channels.tolist() == list(range(40))


def test_what_cannot_be_folded_is_not() -> None:
    """A norm that feeds the residual and an activation that is no multiple must give no link; ReLU must give one."""
    post = _seeded(_PostNorm)
    assert find_links(post, _call(post)) == []
    relu = _seeded(_Relu)
    assert [(link.producer, link.readers) for link in find_links(relu, _call(relu))] == [("up", ("down",))]


def test_a_layer_used_twice_is_left_alone() -> None:
    """Factors of a layer that runs twice would act in both places."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(torch.relu(self.up(torch.relu(self.up(x)))))

    twice = _seeded(Twice)
    assert find_links(twice, _call(twice)) == []


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(WIDTH), lambda: nn.RMSNorm(WIDTH), _OnePlus])
def test_norms_take_factors(norm: Any) -> None:
    """A norm's outputs must be multiplied exactly, also where it multiplies by 1 + weight; others must say no."""
    layer, x = _seeded(norm), torch.randn(5, WIDTH)
    before, factors = layer(x), torch.rand(WIDTH) + 0.5
    assert scalable(layer) == WIDTH and scale_outputs(layer, factors, x)
    torch.testing.assert_close(layer(x), before * factors, rtol=1e-5, atol=1e-5)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.weight)

    odd = _seeded(Odd)
    weight = odd.weight.clone()
    assert not scale_outputs(odd, factors, x) and torch.equal(odd.weight, weight)


def _source(make: Any) -> Source:
    """Two blocks whose inputs have a few strong channels."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(make() for _ in range(2))
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    module = _seeded(Model)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.weight.data[::7] *= 12
    generator = torch.Generator().manual_seed(3)
    samples = [{"x": torch.randn(2, 16, WIDTH, generator=generator)} for _ in range(8)]
    inputs = (TensorSpec("x", "float32", ("batch", "sequence", WIDTH)),)
    signature = Signature(inputs, (TensorSpec("output", "float32", ("batch", "sequence", 5)),))
    flat = FlatModule(module, ("x",), ("output",))
    return Source(ModelRef("python", "m", ""), module, flat, signature, samples=lambda: iter(samples))


@pytest.fixture
def gated() -> Source:
    return _source(lambda: _Gated(lambda: nn.LayerNorm(WIDTH)))


def _context(source: Source) -> Context:
    return Context(source, Calibration(), 0, lambda line: None)


def _distance(one: Source, two: Source) -> float:
    pairs = [(one.flat(*s.values())[0], two.flat(*s.values())[0]) for s in one.samples()]
    return sum(float((a - b).square().sum()) for a, b in pairs) ** 0.5


def test_scales_are_the_formula() -> None:
    """Exponent 0 must scale nothing, 1 by strength itself; all with 1 in the middle of their range."""
    strength, size = torch.tensor([1.0, 4.0, 16.0]), torch.tensor([2.0, 1.0, 1.0])
    tried = {(e, w): f for e, w, f in scales(strength, size, (0.0, 0.5, 1.0))}
    torch.testing.assert_close(tried[0.0, False], torch.ones(3))
    torch.testing.assert_close(tried[1.0, False], strength / 4)
    raw = strength.sqrt() / size.sqrt()
    torch.testing.assert_close(tried[0.5, True], raw / (raw.max() * raw.min()).sqrt())
    assert all(float(f.max() * f.min()) == pytest.approx(1) for f in tried.values())


def test_search_finds_a_better_scale() -> None:
    """With strong channels the found scale must cut the true output error, by the share that it says."""
    generator = torch.Generator().manual_seed(0)
    strength = torch.ones(64)
    strength[::9] = 20
    x, weight = torch.randn(200, 64, generator=generator) * strength, torch.randn(16, 64, generator=generator)
    found = search_scale(weight, gram(x.double()), torch.arange(64), (3, 32, False), [i / 10 for i in range(11)])
    plain = snap(weight, choose(weight, 3, 32, False))
    scaled = weight * found.factors
    other = snap(scaled, choose(scaled, 3, 32, False)) / found.factors
    errors = [float((x @ (weight - w).T).square().sum()) for w in (plain, other)]
    assert found.exponent > 0 and errors[1] < 0.6 * errors[0]
    assert found.gain == pytest.approx(errors[1] / errors[0], rel=1e-3)
    shared = search_scale(weight, gram(x.double()), torch.arange(64) // 4, (3, 32, False), [0.0, 0.5])
    assert torch.equal(shared.factors[::4].repeat_interleave(4), shared.factors)


def test_per_class_is_the_root_mean_square() -> None:
    """Channels of one class must all get the root mean square of the class."""
    got = per_class(torch.tensor([3.0, 5.0, 4.0]), torch.tensor([0, 1, 0]))
    torch.testing.assert_close(got, torch.tensor([12.5**0.5, 5.0, 12.5**0.5]))


def test_folding_keeps_the_function(gated: Source) -> None:
    """Scaled but not rounded, the model must give what it gave, while its weights differ; the source stays."""
    before = {name: tensor.clone() for name, tensor in gated.module.state_dict().items()}
    out, report = awq(gated, Awq(step="awq", round=False, bits=3), _context(gated))
    assert _distance(gated, out) < 1e-4 and not out.encodings
    assert all(torch.equal(before[name], t) for name, t in gated.module.state_dict().items())
    changed = {n for n, t in out.module.state_dict().items() if not torch.equal(t, before[n])}
    assert {"blocks.0.first.weight", "blocks.1.q.weight", "blocks.0.v.weight"} <= changed
    assert {entry["producer"] for entry in report["layers"] if entry["exponent"]} <= {"first", "second", "v", "up"}
    assert [entry["layer"] for entry in report["not_scaled"]] == ["head"]


def test_awq_is_nearer_than_rounding(gated: Source) -> None:
    """Scaled, clipped and rounded weights must lie on grids and give nearer outputs; without the search less so."""
    plain, _ = rtn(gated, Rtn(step="rtn", bits=3, group=12), _context(gated))
    out, report = awq(gated, Awq(step="awq", bits=3, group=12), _context(gated))
    assert all(lies_on(out.module.get_parameter(name), e) for name, e in out.encodings.items())
    assert len(report["layers"]) == 15 and all(0 < entry["output_error"] < 1 for entry in report["layers"])
    assert _distance(gated, out) < 0.8 * _distance(gated, plain)
    again, _ = awq(gated, Awq(step="awq", bits=3, group=12), _context(gated))
    assert all(torch.equal(a, b) for a, b in zip(out.module.parameters(), again.module.parameters(), strict=True))


def test_blocks_that_cannot_be_scaled_are_rounded_and_told() -> None:
    """Where nothing can be folded the layers must still be rounded, with the reason why they were not scaled."""
    post = _source(_PostNorm)
    out, report = awq(post, Awq(step="awq", group=8), _context(post))
    assert len(out.encodings) == 5 and len(report["not_scaled"]) == 5
    assert all("alone makes its input" in entry["reason"] for entry in report["not_scaled"])


def test_a_fold_that_changes_the_outputs_is_undone(gated: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """When folding goes wrong the block must be left as it was, and the report say so."""
    from deploytool.compress.quantize import folding

    def wrong(layer: nn.Linear, factors: Tensor) -> None:
        layer.weight = nn.Parameter(layer.weight * factors * 1.01, requires_grad=False)

    monkeypatch.setattr(folding, "scale_inputs", wrong)
    out, report = awq(gated, Awq(step="awq", round=False, bits=3), _context(gated))
    assert _distance(gated, out) == 0
    assert {entry["reason"] for entry in report["not_scaled"] if entry["layer"] != "head"} == {
        "the block's outputs would have changed"
    }


def test_smoothing_is_the_formula() -> None:
    """s must be max|x|^a / max|w|^(1-a); channels of one class share the largest of both."""
    x, w = torch.tensor([1.0, 16.0, 4.0]), torch.tensor([4.0, 1.0, 0.25])
    torch.testing.assert_close(smoothing(x, w, torch.arange(3), 0.5), torch.tensor([0.5, 4.0, 4.0]))
    torch.testing.assert_close(smoothing(x, w, torch.tensor([0, 0, 1]), 0.5), torch.tensor([2.0, 2.0, 4.0]))


def _rounded_activations(source: Source) -> float:
    """How far outputs move when every linear layer's input is rounded to 8 bits from its extremes, per tensor."""
    linears = [m for m in source.module.modules() if isinstance(m, nn.Linear)]

    def coarse(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = float(args[0].abs().max()) / 31
        return ((args[0] / step).round() * step,)

    plain = [source.flat(*s.values())[0] for s in source.samples()]
    handles = [layer.register_forward_pre_hook(coarse) for layer in linears]
    rounded = [source.flat(*s.values())[0] for s in source.samples()]
    for handle in handles:
        handle.remove()
    return sum(float((a - b).square().sum()) for a, b in zip(plain, rounded, strict=True)) ** 0.5


def test_smoothquant_keeps_the_function_and_evens_activations(gated: Source) -> None:
    """The outputs must stay, the largest channels come down, and rounded activations cost less than before."""
    out, report = smooth(gated, SmoothQuant(step="smoothquant"), _context(gated))
    assert _distance(gated, out) < 1e-3
    by_norm = [entry for entry in report["layers"] if entry["producer"] in ("first", "second")]
    assert by_norm and all(entry["peak_after"] < 0.6 * entry["peak_before"] for entry in by_norm)
    assert _rounded_activations(out) < 0.8 * _rounded_activations(gated)
    assert [entry["layer"] for entry in report["skipped"]] == ["head"]


def test_nothing_to_smooth_is_an_error() -> None:
    """A model without any foldable layer must be refused with the reasons, not passed unchanged."""
    post = _source(_PostNorm)
    with pytest.raises(UsageProblem, match="must find a layer") as caught:
        smooth(post, SmoothQuant(step="smoothquant"), _context(post))
    assert any("alone makes its input" in line for line in caught.value.detail)


def test_masks_stay(gated: Source) -> None:
    """Scaling must not bring a pruned weight back."""
    mask = torch.rand(40, WIDTH, generator=torch.Generator().manual_seed(1)) > 0.5
    gated.module.blocks[0].gate.weight.data.masked_fill_(~mask, 0.0)
    pruned = dataclasses.replace(gated, masks={"blocks.0.gate.weight": mask})
    out, _ = awq(pruned, Awq(step="awq", group=12), _context(pruned))
    assert (out.module.blocks[0].gate.weight[~mask] == 0).all()


def test_output_error_of_nothing() -> None:
    """Inputs that are all zero have no error."""
    assert output_error(torch.ones(2, 3), torch.zeros(2, 3), torch.zeros(3, 3)) == 0.0

"""GPTQ: the kernel against plain definitions, and the step on models of any shape."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.matrices import gram
from deploytool.compress.quantize.gptq import Rounding, apply, gptq, inverse_root
from deploytool.compress.quantize.layers import output_error
from deploytool.compress.quantize.ranges import SHRINKS, choose
from deploytool.compress.quantize.tables import Gptq
from deploytool.compress.step import Calibration, Context
from deploytool.encoding import Encoding
from deploytool.errors import BackendFailed, InputRefused, UsageProblem
from deploytool.load.flat import FlatModule
from deploytool.load.grid import lies_on, snap
from deploytool.load.surgery import with_module
from deploytool.signature import Signature, TensorSpec
from deploytool.source import ModelRef, Source


def _problem(rows: int = 24, columns: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(columns, columns, generator=generator)
    x = torch.randn(600, columns, generator=generator) @ mixed * torch.logspace(-1, 1, columns)
    return torch.randn(rows, columns, generator=generator), gram(x.double())


def _how(group: int, bits: int = 4, order: str = "given", static: bool = True, search: bool = False) -> Rounding:
    shrinks = SHRINKS if search else (1.0,)
    return Rounding(lambda w: choose(w, bits, group, False, shrinks=shrinks), order, static, 0.01)


def test_inverse_root_is_the_definition() -> None:
    """U must be upper triangular and U^T U the inverse of the damped moments."""
    _, moments = _problem()
    root, damping = inverse_root(moments, 0.01)
    damped = moments + 0.01 * moments.diagonal().mean() * torch.eye(100, dtype=torch.float64)
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped), rtol=1e-8, atol=1e-12)
    assert torch.equal(root, root.triu()) and damping == 0.01


def test_damping_grows_aloud_and_ends() -> None:
    """Moments that rounding has made indefinite must take more damping and say how much; hopeless ones must fail."""
    bent = torch.diag(torch.tensor([1.0, 1.0, -0.05], dtype=torch.float64))
    _, damping = inverse_root(bent, 0.01)
    assert damping == pytest.approx(0.1)
    with pytest.raises(BackendFailed, match="positive definite"):
        inverse_root(torch.full((3, 3), torch.nan, dtype=torch.float64), 0.01)


def _by_inverses(weight: Tensor, moments: Tensor, encoding: Encoding) -> Tensor:
    """The greedy scheme as first written (optimal brain quantization in a fixed order): an inverse per column."""
    weight, n = weight.double().clone(), weight.shape[1]
    inverse = torch.linalg.inv(moments + 0.01 * moments.diagonal().mean() * torch.eye(n, dtype=torch.float64))
    for column in range(n):
        rounded = snap(weight.float(), encoding)[:, column].double()
        error = (weight[:, column] - rounded) / inverse[column, column]
        weight -= error[:, None] * inverse[column][None]
        weight[:, column] = rounded
        inverse -= inverse[:, column : column + 1] @ inverse[column : column + 1] / inverse[column, column]
    return weight.float()


def test_columns_are_those_of_one_inverse_per_column() -> None:
    """The kernel must give what updating the inverse after every column gives."""
    weight, moments = _problem(8, 60)
    encoding = choose(weight, 4, 16, False)
    rounded, *_ = gptq(weight, moments, dataclasses.replace(_how(16), damping=0.01))
    expected = _by_inverses(weight, moments, encoding)
    assert ((rounded - expected).abs() > 1e-4).float().mean() < 0.01  # a tie may fall to the other side in float32
    assert output_error(weight, rounded, moments) == pytest.approx(output_error(weight, expected, moments), rel=0.02)


@pytest.mark.parametrize("group", [32, 64, 100])
@pytest.mark.parametrize("order", ["activation", "given"])
@pytest.mark.parametrize("static", [True, False])
def test_nearer_than_rounding(group: int, order: str, static: bool) -> None:
    """The outputs must be much nearer than rounded ones, every value on the grid, for every order and grouping."""
    weight, moments = _problem()
    how = _how(group, order=order, static=static)
    plain = output_error(weight, snap(weight, choose(weight, 4, group, False)), moments)
    rounded, encoding, damping, lost = gptq(weight, moments, how)
    assert lies_on(rounded, encoding) and damping == 0.01 and encoding.whole_zero_points
    assert output_error(weight, rounded, moments) < 0.98 * plain
    off = weight.double() - rounded.double()
    torch.testing.assert_close(lost.double(), ((off @ moments) * off).sum(dim=1), rtol=1e-2, atol=0)
    again, *_ = gptq(weight, moments, how)
    assert torch.equal(rounded, again)


def test_output_error_is_the_outputs_error() -> None:
    """It must be |X (W - V)^T| / |X W^T|."""
    x, weight, other = torch.randn(50, 20), torch.randn(6, 20), torch.randn(6, 20)
    expected = ((x @ (weight - other).T).norm() / (x @ weight.T).norm()).item()
    assert output_error(weight, other, gram(x.double())) == pytest.approx(expected, rel=1e-4)


def test_zeros_and_dead_inputs() -> None:
    """Masked weights must be exactly zero, and inputs that were always zero be rounded to nearest."""
    weight, moments = _problem()
    keep = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5
    moments[7], moments[:, 7] = 0, 0
    weight = weight * keep
    rounded, encoding, *_ = gptq(weight, moments, _how(32, order="activation"), keep)
    assert (rounded[~keep] == 0).all() and lies_on(rounded, encoding)
    assert torch.equal(rounded[:, 7], snap(weight, encoding)[:, 7])
    rounded, encoding, *_ = gptq(weight, torch.zeros_like(moments), _how(32))
    assert torch.equal(rounded, snap(weight, encoding))


class _Blocks(nn.Module):
    """Two residual blocks of attention-like linears of one input, a convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 20, 3, padding=1)
        self.blocks = nn.ModuleList(_Block() for _ in range(2))
        self.head = nn.Linear(20, 4)
        self.idle = nn.Linear(20, 4)

    def forward(self, image: Tensor) -> Tensor:
        hidden = self.stem(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean(1))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.relu(self.a(x)) * self.b(x))


@pytest.fixture
def vision() -> Source:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = _Blocks().eval().requires_grad_(False)
        samples = [{"image": torch.randn(2, 1, 8, 8)} for _ in range(6)]
    inputs = (TensorSpec("image", "float32", ("batch", 1, 8, 8)),)
    signature = Signature(inputs, (TensorSpec("output", "float32", ("batch", 4)),))
    flat = FlatModule(module, ("image",), ("output",))
    return Source(ModelRef("python", "vision", ""), module, flat, signature, samples=lambda: iter(samples))


def _context(source: Source, lines: list[str] | None = None) -> Context:
    return Context(source, Calibration(), 0, (lambda line: None) if lines is None else lines.append)


def _loss(source: Source, other: Source) -> float:
    pairs = [(source.flat(*s.values())[0], other.flat(*s.values())[0]) for s in source.samples()]
    return sum(float((a - b).square().sum()) for a, b in pairs)


def test_step_quantizes_every_layer(vision: Source) -> None:
    """Linears and convolutions must lie on grids and together be nearer than rounded ones; what never runs is told."""
    from deploytool.compress.quantize.rtn import apply as round_all
    from deploytool.compress.quantize.tables import Rtn

    before = {name: tensor.clone() for name, tensor in vision.module.state_dict().items()}
    out, report = apply(vision, Gptq(step="gptq", bits=3, group=8), _context(vision))
    assert all(torch.equal(before[name], t) for name, t in vision.module.state_dict().items())
    layers = [entry["layer"] for entry in report["layers"]]
    assert set(layers) == {"stem", "head"} | {f"blocks.{i}.{n}" for i in (0, 1) for n in ("a", "b", "out")}
    assert {"layer": "idle", "reason": "no calibration sample reached it"} in report["skipped"]
    assert all(lies_on(out.module.get_parameter(name), e) for name, e in out.encodings.items())
    assert set(out.encodings) == {f"{name}.weight" for name in layers} and report["damping_raised"] == []
    rounded, _ = round_all(vision, Rtn(step="rtn", bits=3, group=8), _context(vision))
    assert _loss(vision, out) < 0.7 * _loss(vision, rounded)


def test_layers_of_one_input_are_as_if_alone(vision: Source) -> None:
    """Two layers that read the same tensor are swept together; each must get what it gets alone."""
    both, _ = apply(vision, Gptq(step="gptq", include=("blocks.0.a", "blocks.0.b")), _context(vision))
    alone, _ = apply(vision, Gptq(step="gptq", include=("blocks.0.b",)), _context(vision))
    torch.testing.assert_close(both.module.blocks[0].b.weight, alone.module.blocks[0].b.weight)


def test_masks_survive(vision: Source) -> None:
    """Pruned weights must stay exactly zero."""
    weight = vision.module.blocks[0].out.weight
    mask = weight.abs() > weight.abs().median()
    with torch.no_grad():
        weight.masked_fill_(~mask, 0.0)
    pruned = with_module(vision, vision.module, masks={"blocks.0.out.weight": mask})
    out, _ = apply(pruned, Gptq(step="gptq", group=8), _context(vision))
    assert (out.module.blocks[0].out.weight[~mask] == 0).all()


def test_raised_damping_is_told(vision: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that needed more damping than asked must be named in the report and in the progress."""
    real = torch.linalg.cholesky_ex
    calls: list[int] = []

    def fails_first(matrix: Tensor) -> Any:
        calls.append(1)
        return real(-matrix) if len(calls) in (1, 3) else real(matrix)  # in float32, and then in float64

    monkeypatch.setattr(torch.linalg, "cholesky_ex", fails_first)
    lines: list[str] = []
    _, report = apply(vision, Gptq(step="gptq"), _context(vision, lines))
    assert report["damping_raised"] == ["stem"] and report["layers"][0]["damping"] == pytest.approx(0.1)
    assert any("damping was raised for 1 layers, stem" in line for line in lines)


def test_wrong_input_is_refused(vision: Source) -> None:
    """No samples, NaN in samples and patterns that match nothing must be refused."""
    settings = Gptq(step="gptq")
    empty = dataclasses.replace(vision, samples=lambda: iter(()))
    with pytest.raises(InputRefused, match="at least one"):
        apply(empty, settings, _context(empty))
    broken = dataclasses.replace(vision, samples=lambda: iter([{"image": torch.full((1, 1, 8, 8), torch.nan)}]))
    with pytest.raises(InputRefused, match="finite"):
        apply(broken, settings, _context(broken))
    with pytest.raises(UsageProblem, match="must match layers"):
        apply(vision, Gptq(step="gptq", include=("nothing",)), _context(vision))
    with pytest.raises(InputRefused, match="reach the chosen layers"):
        apply(vision, Gptq(step="gptq", include=("idle",)), _context(vision))

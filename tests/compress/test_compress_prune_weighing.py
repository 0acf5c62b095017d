"""How much errors of a layer's output matter to the model's outputs, and what structured removal makes of it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block
from deploytool.compress.prune.readings import read
from deploytool.compress.prune.refit import Reading, removal_order
from deploytool.compress.prune.structured import apply
from deploytool.compress.prune.tables import Structured
from deploytool.compress.prune.weighing import Weighing, weigh_errors
from deploytool.compress.step import Calibration, Context
from deploytool.errors import UsageProblem
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

NET = """
import torch
from torch import nn

INPUTS = {"x": ("batch", 4, 6)}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        with torch.no_grad():
            self.down.weight[:4] *= 10.0  # strong, but the head hardly looks at them
            self.head.weight[:, :4] *= 0.001
            self.down.weight[:4, 6:] = 0
            self.down.weight[4:, :6] = 0

    def forward(self, x):
        hidden = self.down(torch.relu(self.up(x)))
        return READ


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def samples():
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(rows, 4, 6, generator=generator)} for rows in (2, 3, 4, 5)]
"""


def _source(folder: Path, read: str = "self.head(hidden)") -> Source:
    (folder / "net.py").write_text(NET.replace("READ", read))
    return open_source(resolve(str(folder / "net.py")))


def _weighing(source: Source) -> Weighing:
    return weigh_errors(source, ["down"], list(source.samples()))["down"]


def test_directions_count_by_what_the_outputs_make_of_them(tmp_path: Path) -> None:
    """R R^T must be large only where the head reads, as the head's own W^T W is for outputs of one size."""
    root = _weighing(_source(tmp_path)).root
    square = root @ root.T
    assert float(square.trace()) == pytest.approx(1.0, rel=1e-3)
    assert float(square[:4, :4].diagonal().max()) < 1e-3 * float(square[4:, 4:].diagonal().min())


def test_rows_that_nothing_reads_weigh_nothing(tmp_path: Path) -> None:
    """Where the model reads one token alone, its rows must have all of the weight, and the mean must be 1."""
    rows = _weighing(_source(tmp_path, "self.head(hidden)[:, 1]")).rows
    assert [len(r) for r in rows] == [8, 12, 16, 20]
    by_token = torch.cat([r.view(-1, 4) for r in rows])
    assert bool((by_token[:, [0, 2, 3]] == 0).all()) and bool((by_token[:, 1] > 0).all())
    assert float(by_token.mean()) == pytest.approx(1.0, rel=1e-5)


def test_every_row_of_the_outputs_counts_the_same(tmp_path: Path) -> None:
    """An output that is a thousand times larger, of all rows or of some, must not change the weights."""
    plain, scaled = (_weighing(_source(tmp_path, f"{scale} * self.head(hidden).flatten(1)")) for scale in (1, 1000))
    torch.testing.assert_close(plain.root, scaled.root, rtol=1e-3, atol=1e-5)
    for one, two in zip(plain.rows, scaled.rows, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_the_units_that_the_outputs_do_not_see_go_first(tmp_path: Path) -> None:
    """Strong neurons that hardly reach the outputs must go instead of weak ones that do."""
    source = _source(tmp_path)
    errors = {}
    for weigh in ("alike", "outputs"):
        settings = Structured(step="structured", remove=0.5, weigh=weigh)  # type: ignore[arg-type]
        pruned, _ = apply(source, settings, Context(source, Calibration(samples=4), 0, lambda line: None))
        with torch.no_grad():
            errors[weigh] = sum(float((pruned.flat(s["x"])[0] - source.flat(s["x"])[0]).square().sum())
                                for s in source.samples())  # fmt: skip
    assert errors["outputs"] < 0.05 * errors["alike"]


def test_only_the_named_outputs_count(tmp_path: Path) -> None:
    """Rows and directions that only another output reads must weigh nothing; unknown names must be refused."""
    source = _source(tmp_path, """{"whole": hidden, "first": self.head(hidden)[:, 0]}""")
    one = weigh_errors(source, ["down"], list(source.samples()), ["first"])["down"]
    both = _weighing(source)
    assert all(bool((rows.view(-1, 4)[:, 1:] == 0).all()) for rows in one.rows)
    assert all(bool((rows > 0).all()) for rows in both.rows)
    with pytest.raises(UsageProblem, match="got frist") as refused:
        weigh_errors(source, ["down"], [], ["frist"])
    assert "first" in refused.value.detail[0]
    with pytest.raises(ValueError, match="output must be left out"):
        Structured(step="structured", remove=0.5, output=("first",))
    with pytest.raises(ValueError, match="where nothing is fitted"):
        Structured(step="structured", remove=0.5, weigh="outputs", importance="magnitude", reconstruct=False)


def test_two_runs_are_bit_identical_and_leave_the_model_alone(tmp_path: Path) -> None:
    """The projections are drawn from a seed of their own, and no gradient may stay at the weights."""
    source = _source(tmp_path)
    before = {name: tensor.clone() for name, tensor in source.module.state_dict().items()}
    one, two = (_weighing(source) for _ in range(2))
    assert torch.equal(one.root, two.root) and all(torch.equal(a, b) for a, b in zip(one.rows, two.rows, strict=True))
    assert all(torch.equal(before[n], t) for n, t in source.module.state_dict().items())
    assert all(p.grad is None for p in source.module.parameters())
    assert not any(m._forward_hooks for m in source.module.modules())


def test_outputs_without_slopes_are_refused(tmp_path: Path) -> None:
    """Outputs that cannot be differentiated say nothing about errors: an error, not equal weights."""
    for read_as in ("self.head(hidden).round()", "self.head(hidden).argmax(-1)"):
        with pytest.raises(UsageProblem, match="no slope at down"):
            _weighing(_source(tmp_path, read_as))


def test_samples_that_do_not_reach_a_layer_have_no_rows(tmp_path: Path) -> None:
    """The weights must stay in step with the samples where one of them takes another way."""
    source = _source(tmp_path)
    skipping = with_module(source, shell(source.module))
    skipping.module.down = _Skipped(skipping.module.down)
    weighing = weigh_errors(skipping, ["down.layer"], list(source.samples()))["down.layer"]
    assert [len(r) for r in weighing.rows] == [8, 12, 16, 0]


def test_samples_that_do_not_reach_the_block_are_refused(tmp_path: Path) -> None:
    """A block that ran on fewer samples than were weighed must not get the weights of others."""
    source = _source(tmp_path)
    calls: list[Any] = [((), dict(s)) for s in source.samples()]
    block = Block("net", source.module, {"down": source.module.down}, calls[1:])
    with pytest.raises(UsageProblem, match="each sample reaches net once"):
        read(block, block, {"down": []}, whole=True, weighing={"down": _weighing(source)})


class _Skipped(nn.Module):
    """Runs its layer for up to four rows only."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        given: Tensor = self.layer(x) if len(x) < 5 else x[..., :8]
        return given


def test_readings_are_weighed_sums(tmp_path: Path) -> None:
    """G and D must be those of rows times the roots of their weights, and the spread that of rows times R."""
    source = _source(tmp_path)
    samples = list(source.samples())
    block = Block("net", source.module, {"down": source.module.down}, [((), dict(s)) for s in samples])
    weighing = _weighing(source)
    [reading] = read(block, block, {"down": []}, whole=True, weighing={"down": weighing})
    with torch.no_grad():
        x = torch.cat([torch.relu(source.module.up(s["x"])).flatten(0, 1) for s in samples]).double()
        y = source.module.double().down(x)
        source.module.float()
    ones, weights = torch.cat([x, torch.ones(len(x), 1)], dim=1), torch.cat(list(weighing.rows)).double()[:, None]
    torch.testing.assert_close(reading.gram, ones.T @ (weights * ones), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reading.wanted, y.T @ (weights * ones), rtol=1e-4, atol=1e-4)
    assert reading.root is weighing.root


def test_losses_are_those_of_the_weighed_outputs() -> None:
    """The loss of a removal must be what the best fit without the column leaves in |e R|^2, as a share."""
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 5, generator=generator).double(), torch.randn(3, 5, generator=generator).double()
    root = torch.randn(3, 3, generator=generator).double().tril()
    reading = Reading(w, x.T @ x, w @ x.T @ x, [torch.tensor([i]) for i in range(5)], None, 7.0, root)
    [first, *_], [loss, *_] = removal_order([reading], 1e-9, 1)
    left = {}
    for gone in range(5):
        kept = [i for i in range(5) if i != gone]
        fitted = torch.linalg.lstsq(x[:, kept], x @ w.T).solution
        left[gone] = float(((x @ w.T - x[:, kept] @ fitted) @ root).square().sum())
    assert first == min(left, key=lambda gone: left[gone])
    assert loss == pytest.approx(left[first] / 7.0, rel=1e-3)
    alike = dataclasses.replace(reading, root=None)
    assert removal_order([alike], 1e-9, 1)[1][0] != pytest.approx(loss, rel=1e-2)

"""What the readers of removed units are fitted to: the sums that their outputs go into, as the uncompressed model has
them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block
from deploytool.compress.prune.readings import _Spread, find_sum, read
from deploytool.compress.prune.structured import Removal, _ignore, _refit_makers
from deploytool.compress.prune.tables import Structured
from deploytool.compress.prune.units import Group


class Residual(nn.Module):
    """Both kinds of residual blocks, and one whose branch is scaled before it is added."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm, self.drop, self.up, self.down = nn.LayerNorm(6), nn.Dropout(), nn.Linear(6, 9), nn.Linear(9, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        if self.kind == "before":
            return x + self.drop(self.down(torch.relu(self.up(self.norm(x))))), 1
        added = self.down(torch.relu(self.up(x)))
        return self.norm(x + (0.5 * added if self.kind == "scaled" else self.drop(added))), 1


def _block(kind: str, rows: Tensor) -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Residual(kind).eval()
    return Block(
        "block", module, {"block.down": module.down, "block.up": module.up}, [((part,), {}) for part in rows.split(10)]
    )


def _rows(seed: int) -> Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "place"), [("after", "norm"), ("before", ""), ("scaled", None)])
def test_the_sum_is_found_by_disturbing_the_layer(kind: str, place: str | None) -> None:
    """The module that reads the sum, or the block's own output, must be found; a scaled branch has no such place."""
    assert find_sum(_block(kind, _rows(1)), "block.down") == place


@pytest.mark.parametrize("kind", ["after", "before", "scaled"])
def test_a_reader_makes_good_for_what_the_other_branch_has_lost(kind: str) -> None:
    """What is wanted must be the old sum less the branch of now, and the old output where there is no sum."""
    x0 = _rows(1)
    x = x0 + 0.3 * _rows(2)
    before, now = _block(kind, x0), _block(kind, x)
    [reading] = read(before, now, {"block.down": []}, whole=True)
    module = before.module
    with torch.no_grad():
        normed = [module.norm(t) if kind == "before" else t for t in (x0, x)]
        was, seen = (torch.relu(module.up(t)) for t in normed)
        wanted = module.down(was) + (0 if kind == "scaled" else x0 - x)
    ones = torch.cat([seen, torch.ones(40, 1)], dim=1).double()
    torch.testing.assert_close(reading.wanted, wanted.double().T @ ones, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(reading.gram, ones.T @ ones, rtol=1e-4, atol=1e-4)
    assert reading.held is not None
    torch.testing.assert_close(reading.held[1], wanted[30:].double().T @ ones[30:], rtol=1e-4, atol=1e-4)
    assert (reading.spread is None) == (kind == "scaled")
    [alone] = read(before, now, {"block.down": []}, whole=False)
    assert alone.spread is None
    torch.testing.assert_close(alone.wanted, module.down(was).double().detach().T @ ones, rtol=1e-4, atol=1e-4)


def test_losses_are_shares_of_the_spread_of_the_sum() -> None:
    """A layer that adds little to its sum must lose little, whatever share of its own output that is."""
    before = _block("after", _rows(1))
    spread = read(before, before, {"block.down": []}, whole=True)[0].spread
    with torch.no_grad():
        sums = _rows(1) + before.module.down(torch.relu(before.module.up(_rows(1))))
    assert spread == pytest.approx(float((sums - sums.mean(dim=0)).square().sum()), rel=1e-4)


@pytest.mark.parametrize("seed", range(8))
def test_sums_that_never_vary_have_no_spread(seed: int) -> None:
    """Rounding must not make it less than nothing, which would turn the order of removal around."""
    spread = _Spread()
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(seed))
    for _ in range(12):
        spread.add(row.expand(3, 8))
    assert spread.total == 0.0
    spread.add(1.01 * row)
    assert spread.total > 0


@pytest.mark.parametrize("fixed", [True, False])
def test_makers_give_what_they_gave_before(fixed: bool) -> None:
    """A layer that makes units must be fitted to the inputs that it gets by now, unless it has to stay as it is."""
    x0 = _rows(1)
    x = x0 @ torch.linspace(0.5, 1.5, 6).diag() + 0.4 + 0.05 * _rows(2)
    before, now = _block("after", x0), _block("after", x)
    group = Group([{"block.up": [i]} for i in range(9)], [{"block.down": [i]} for i in range(9)])
    removal = Removal(group, "neurons", 3, [], fixed=frozenset(["block.up"] if fixed else []))
    with torch.no_grad():
        wanted = before.module.up(x0)
        old = float((before.module.up(x) - wanted).square().mean())
        _refit_makers(now, before, removal, Structured(step="structured", remove=0.5))
        new = float((now.module.up(x) - wanted).square().mean())
    assert new == old if fixed else new < 0.1 * old


@pytest.mark.parametrize(("kind", "count"), [("after", 0), ("scaled", 3)])
def test_readers_keep_the_zeros_of_earlier_steps(kind: str, count: int) -> None:
    """Weights that an earlier step pruned must stay zero, and the others must make good for what the inputs lost."""
    before, now = _block(kind, _rows(1)), _block(kind, _rows(1) + 0.3 * _rows(2))
    mask = torch.rand(6, 9, generator=torch.Generator().manual_seed(3)) < 0.5
    with torch.no_grad():
        for block in (before, now):
            block.module.down.weight.mul_(mask)
    group = Group([{"block.up": [i]} for i in range(9)], [{"block.down": [i]} for i in range(9)])
    removal = Removal(group, "neurons", count, [], masks={"block.down.weight": mask})
    with torch.no_grad():
        wanted = before.module(_rows(1))[0]
        old = float((now.module(now.calls[0][0][0])[0] - wanted[:10]).square().mean())
        _ignore(now, before, ["block.down"], removal, None, Structured(step="structured", remove=0.5))
        weight = now.module.down.weight
        new = float((now.module(now.calls[0][0][0])[0] - wanted[:10]).square().mean())
    assert bool((weight[~mask] == 0).all()) and int((weight[mask] != 0).sum()) > 0
    assert bool((weight[:, removal.units] == 0).all()) and len(removal.units) == count
    assert count or new < old

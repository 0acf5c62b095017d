"""Grids chosen from weights, grids found in weights, rounding to nearest, and encodings that travel with the model."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from deploytool.compress.quantize.found import find_grid
from deploytool.compress.quantize.ranges import SHRINKS, choose, grid_between
from deploytool.compress.quantize.rtn import apply
from deploytool.compress.quantize.tables import Rtn
from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress, compress_job
from deploytool.compress.step import Context
from deploytool.errors import InputRefused, InternalError, UsageProblem
from deploytool.load.compressed import save_compressed
from deploytool.load.grid import lies_on, snap
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import ModelRef, Source
from deploytool.storage import sha256_file


def _weight(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("columns", [64, 100, 7])
def test_every_value_is_near_the_grid(bits: int, symmetric: bool, columns: int) -> None:
    """From extreme to extreme no value may be farther than half a step from the grid; 0 must be on it exactly."""
    weight = _weight(5, columns)
    weight[0, 0] = 0
    weight[1] = weight[1].abs()
    encoding = choose(weight, bits, 32, symmetric)
    assert tuple(encoding.scale.shape) == (5, -(-columns // 32))
    snapped = snap(weight, encoding)
    half = encoding.scale.repeat_interleave(32, 1)[:, :columns] / 2
    slack = 1.0 if not symmetric else 1.0 + 1e-6
    # An asymmetric zero point is rounded, which may move the ends by another half of a step.
    assert ((snapped - weight).abs() <= half * (slack if symmetric else 2.0) + 1e-6).all()
    assert snapped[0, 0] == 0 and encoding.whole_zero_points and encoding.symmetric == symmetric


def test_grids_by_hand() -> None:
    """Scales and zero points must be those computed by hand, also where all is zero or on one side of it."""
    low, high = torch.tensor([[-3.0, 0.0, -8.0, 0.0]]), torch.tensor([[12.0, 15.0, 0.0, 0.0]])
    scale, zero = grid_between(low, high, 4, False)
    np.testing.assert_allclose(scale.numpy(), [[1, 1, 8 / 15, 1]], rtol=1e-6)
    np.testing.assert_array_equal(zero.numpy(), [[3, 0, 15, 0]])
    scale, zero = grid_between(low, high, 4, True)
    np.testing.assert_allclose(scale.numpy(), [[12 / 7, 15 / 7, 1, 1]], rtol=1e-6)
    np.testing.assert_array_equal(zero.numpy(), [[8, 8, 8, 8]])


def test_search_is_never_worse_and_heeds_importance() -> None:
    """The searched grid's weighted error must be at most the plain one's in every group, and follow the weights."""
    weight = _weight(8, 128)
    weight[:, 3] *= 6
    plain, searched = (choose(weight, 3, 64, False, shrinks=s) for s in ((1.0,), SHRINKS))
    errors = [(snap(weight, e) - weight).square().view(8, 2, 64).sum(2) for e in (plain, searched)]
    assert (errors[1] <= errors[0] + 1e-6).all() and errors[1].sum() < errors[0].sum()
    heavy = torch.ones(128)
    heavy[3] = 1e4
    kept = choose(weight, 3, 64, False, shrinks=SHRINKS, importance=heavy)

    def loss(e: Any) -> float:
        return float((snap(weight, e)[:, 3] - weight[:, 3]).square().sum())

    assert loss(kept) < loss(searched)


@pytest.mark.parametrize("columns", [576, 100, 64, 48])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64])
def test_a_grid_is_found_again(columns: int, symmetric: bool, group: int) -> None:
    """Weights on a grid must give it back, without loss beyond the last bit; other weights must give none."""
    weight = _weight(16, columns)
    snapped = snap(weight, choose(weight, 4, group, symmetric))
    found = find_grid(snapped)
    assert found is not None and found.group >= min(group, 32)
    torch.testing.assert_close(snap(snapped, found), snapped, rtol=1e-6, atol=1e-6)
    assert find_grid(weight) is None
    worse = snapped.clone()
    worse[7, 11] += 0.02
    assert find_grid(worse) is None


def test_grids_with_an_offset_are_found() -> None:
    """A minimum per group that is no multiple of the step must be kept as a fractional zero point."""
    codes = torch.randint(0, 16, (8, 96), generator=torch.Generator().manual_seed(1)).float()
    step, low = torch.rand(8, 3) + 0.5, torch.randn(8, 3).half().float()
    weight = codes * step.half().float().repeat_interleave(32, 1) + low.repeat_interleave(32, 1)
    found = find_grid(weight)
    assert found is not None and found.group == 32 and not found.whole_zero_points
    torch.testing.assert_close(snap(weight, found), weight, rtol=1e-5, atol=1e-5)


def test_constant_and_empty_groups_are_found() -> None:
    """Groups of one value, zero or not, must be found and given back."""
    weight = torch.zeros(3, 32)
    weight[1], weight[2] = 0.3, -2.0
    found = find_grid(weight)
    assert found is not None and found.whole_zero_points
    torch.testing.assert_close(snap(weight, found), weight)


def _apply(source: Source, context: Context, **settings: Any) -> tuple[Source, dict[str, Any]]:
    return apply(source, Rtn(step="rtn", **settings), context)


def test_step_rounds_a_copy_and_reports(tiny: Source, context: Context) -> None:
    """Chosen weights must lie on their grids, the given source and all other tensors stay, reasons be told."""
    before = {name: tensor.clone() for name, tensor in tiny.module.state_dict().items()}
    out, report = _apply(tiny, context, bits=4, group=8)
    assert set(out.encodings) == {"up.weight", "down.weight"} and not tiny.encodings
    assert all(lies_on(out.module.get_parameter(name), e) for name, e in out.encodings.items())
    assert all(torch.equal(before[name], t) for name, t in tiny.module.state_dict().items())
    changed = {n for n, t in out.module.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == set(out.encodings)
    assert out.module.head.weight is out.module.embed.weight
    assert {entry["layer"] for entry in report["skipped"]} == {"embed", "head"}
    up = next(entry for entry in report["layers"] if entry["layer"] == "up")
    assert up["bits_per_weight"] == 4 + (16 + 4) * 2 / 12 and 0 < up["error"] < 0.1


def test_more_bits_and_smaller_groups_are_nearer(tiny: Source, context: Context) -> None:
    """The error must fall with every bit and with smaller groups; symmetric 8 bits must be below one percent."""

    def error(**settings: Any) -> float:
        return sum(entry["error"] for entry in _apply(tiny, context, **settings)[1]["layers"])

    assert error(bits=2) > error(bits=3) > error(bits=4) > error(bits=8)
    assert error(group=4) < error(group=40) == error(group="channel")
    assert error(bits=8, symmetric=True, group="channel") < 0.02


def test_found_grids_need_one(tiny: Source, context: Context) -> None:
    """Asking for the grid of weights that lie on none must be refused; on one it must change nothing."""
    with pytest.raises(UsageProblem, match="must find a layer") as caught:
        _apply(tiny, context, group="found")
    assert any("lies on no grid of 4 bits" in line for line in caught.value.detail)
    once, _ = _apply(tiny, context, bits=3, group=16, include=("up",))
    again, report = _apply(dataclasses.replace(once, encodings={}), context, bits=3, group="found")
    assert [entry["layer"] for entry in report["layers"]] == ["up"] and report["layers"][0]["error"] < 1e-6
    torch.testing.assert_close(again.module.up.weight, once.module.up.weight, rtol=1e-6, atol=1e-7)


def _saved(tiny: Source, folder: Path, *steps: dict[str, Any]) -> Source:
    recipe = parse_recipe({"compress": list(steps)}, "", where="recipe")
    compressed, report = compress(tiny, recipe)
    save_compressed(compressed, tiny, report, folder / "out", overwrite=False)
    return compressed


def test_encodings_come_back_from_the_folder(tiny: Source, tmp_path: Path) -> None:
    """Weights and encodings must come back bit for bit, and the folder must hold the codes instead of floats."""
    out = _saved(tiny, tmp_path, {"step": "magnitude", "sparsity": 0.5}, {"step": "rtn", "bits": 3, "group": 16})
    back = open_source(resolve(str(tmp_path / "out")))
    for name, parameter in out.module.named_parameters():
        assert torch.equal(parameter, back.module.get_parameter(name))
    assert back.encodings.keys() == out.encodings.keys()
    for name, encoding in out.encodings.items():
        other = back.encodings[name]
        assert torch.equal(encoding.scale, other.scale) and torch.equal(encoding.zero_point, other.zero_point)
        assert encoding.to_json() == other.to_json() and lies_on(back.module.get_parameter(name), other)
    stored = load_file(tmp_path / "out" / "weights.safetensors")
    assert stored["up.weight:codes"].numel() == 480 * 3 // 8 and "up.weight" not in stored
    assert torch.equal(back.masks["up.weight"], out.module.up.weight != 0)


def test_the_size_counts_codes(tiny: Source) -> None:
    """The report's bytes must be those of codes, scales and zero points, countable by hand."""
    recipe = parse_recipe({"compress": [{"step": "rtn", "group": 20, "include": ["up"]}]}, "", where="recipe")
    _, report = compress(tiny, recipe)
    saved = 480 * 4 - 480 // 2 - 40 * 2 * 4
    assert report["after"]["size_bytes"] == report["before"]["size_bytes"] - saved


def test_a_later_step_that_moves_the_weights_drops_the_grid(tiny: Source, tmp_path: Path) -> None:
    """Weights that training moved are floats again, and the report must say so; a stale encoding must not be saved."""
    steps = [{"step": "rtn"}, {"step": "distill", "steps": 2}]
    out, report = compress(tiny, parse_recipe({"compress": steps}, "", where="recipe"))
    if out.encodings:  # a training step may keep grids by itself
        assert all(lies_on(out.module.get_parameter(n), e) for n, e in out.encodings.items())
    else:
        assert report["steps"][1]["encodings_lost"] == ["down.weight", "up.weight"]
    rounded, _ = compress(tiny, parse_recipe({"compress": steps[:1]}, "", where="recipe"))
    stale = dataclasses.replace(tiny, encodings=rounded.encodings)
    with pytest.raises(InternalError, match="must lie on its grid"):
        save_compressed(stale, tiny, report, tmp_path / "out", overwrite=False)


def _damage(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the weights' file and give the document its new digest."""
    path = folder / "weights.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)
    document = json.loads((folder / "compressed.json").read_text())
    (folder / "compressed.json").write_text(json.dumps({**document, "weights_sha256": sha256_file(path)}))


@pytest.mark.parametrize("change", [
    lambda t: t["up.weight:scale"].fill_(torch.nan),
    lambda t: t["up.weight:scale"].fill_(0.0),
    lambda t: t.update({"up.weight:codes": t["up.weight:codes"][:-1].clone()}),
    lambda t: t.update({"up.weight:scale": torch.ones(40, 3), "up.weight:zero_point": torch.ones(40, 3)}),
    lambda t: t.pop("up.weight:zero_point"),
])  # fmt: skip
def test_damaged_encodings_are_refused(tiny: Source, tmp_path: Path, change: Any) -> None:
    """Codes, scales or zero points that are missing, of the wrong size or no numbers must be refused."""
    _saved(tiny, tmp_path, {"step": "rtn"})
    _damage(tmp_path / "out", change)
    with pytest.raises(InputRefused) as caught:
        open_source(resolve(str(tmp_path / "out")))
    assert caught.value.code == "DT314"


def test_two_runs_are_identical(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """The same recipe must write the same bytes."""
    (tmp_path / "r.toml").write_text('[[compress]]\nstep = "rtn"\nsearch = true\ngroup = 16\n')
    for name in "ab":
        compress_job(dataclasses.asdict(tiny_ref), str(tmp_path / "r.toml"), str(tmp_path / name))
    a, b = ((tmp_path / name / "weights.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize("wrong", ["bits = 9", "bits = 1", "group = 0", 'group = "row"', "bits = 4.0", "grp = 3"])
def test_wrong_settings_are_refused(wrong: str) -> None:
    """Settings that cannot be must be usage errors that name the key."""
    text = f'[[compress]]\nstep = "rtn"\n{wrong}\n'
    with pytest.raises(UsageProblem) as caught:
        parse_recipe(tomllib.loads(text), text, where="r.toml")
    assert any("r.toml:3" in line for line in caught.value.detail)

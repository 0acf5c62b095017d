"""Shallow students, inner layers, other teachers, teacher outputs on disk, grids that stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from deploytool.compress.distill.cached import TeacherCache
from deploytool.compress.distill.distill import apply
from deploytool.compress.distill.drop_layers import apply as drop
from deploytool.compress.distill.narrow import apply as narrow
from deploytool.compress.distill.tables import Distill, DropLayers, Narrow
from deploytool.compress.prune.magnitude import apply as prune
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.quantize.rtn import apply as rtn
from deploytool.compress.quantize.tables import Rtn
from deploytool.compress.run import measure
from deploytool.compress.step import Calibration, Context
from deploytool.errors import EnvironmentLacking, InputRefused, IntegrityBroken, UsageProblem
from deploytool.load.compressed import open_compressed, save_compressed
from deploytool.load.grid import lies_on
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.settings import check_table
from deploytool.source import ModelRef, Source

DEEP = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy

INPUTS = {"ids": ("batch", "sequence")}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x + x.roll(1, 1)))))


class Deep(nn.Module):
    def __init__(self, width, classes):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x)}


def build():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Deep(WIDTH, CLASSES)


def _ids(seed, count):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 11, (8, 6), generator=generator) for _ in range(count)]


def samples():
    return [{"ids": ids[:n]} for n, ids in enumerate(_ids(1, 3), 1)]


def train_batches(epoch: int = 0):
    order = torch.randperm(32, generator=torch.Generator().manual_seed(epoch))
    for rows in torch.cat(_ids(2, 4))[order].split(8):
        yield {"ids": rows, "target": (rows + 1) % 11}


def loss(outputs, batch):
    return cross_entropy(outputs["logits"].flatten(0, 1), batch["target"].flatten())
"""


def _write(folder: Path, name: str = "deep", width: int = 12, classes: int = 11) -> ModelRef:
    path = folder / f"{name}.py"
    path.write_text(DEEP.replace("WIDTH", str(width)).replace("CLASSES", str(classes)))
    return resolve(str(path))


@pytest.fixture
def deep(tmp_path: Path) -> Source:
    return open_source(_write(tmp_path))


@pytest.fixture
def deep_context(deep: Source) -> Context:
    return Context(deep, Calibration(), 0, lambda line: None)


def _distill(**settings: Any) -> Distill:
    return Distill(step="distill", **{"epochs": 6, "learning_rate": 0.01, **settings})


def test_a_shallow_student_travels(deep: Source, deep_context: Context, tmp_path: Path) -> None:
    """Two of four blocks must stay with their own weights, learn, and come back from the folder to the bit."""
    student, report = drop(deep, DropLayers(step="drop-layers", blocks="blocks", keep=2), deep_context)
    assert report["kept"] == [0, 3] and len(deep.module.blocks) == 4
    assert torch.equal(student.module.blocks[1].up.weight, deep.module.blocks[3].up.weight)
    trained, told = apply(student, _distill(alpha=1.0, hidden="blocks"), deep_context)
    assert told["hidden"] == {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}
    assert told["loss_last"] < 0.5 * told["loss_first"]
    out = tmp_path / "out"
    save_compressed(dataclasses.replace(trained, original=deep.ref), deep, {"before": {}}, out, overwrite=False)
    again = open_compressed(ModelRef("compressed", "out", str(out)))
    ids = next(iter(deep.samples()))["ids"]
    assert torch.equal(again.flat(ids)[0], trained.flat(ids)[0]) and len(again.module.blocks) == 2


def test_layers_that_cannot_be_dropped(deep: Source, deep_context: Context) -> None:
    """An unknown list, as many layers as there are, one that is not there, and both ways at once must be refused."""
    for settings, said in (
        ({"blocks": "block", "keep": 2}, "list of layers"), ({"blocks": "blocks", "keep": 4}, "fewer must stay"),
        ({"blocks": "blocks", "layers": (0, 4)}, "fewer must stay"),
    ):  # fmt: skip
        with pytest.raises(UsageProblem, match=said):
            drop(deep, DropLayers(step="drop-layers", **settings), deep_context)  # type: ignore[arg-type]
    for table in ({"blocks": "blocks"}, {"blocks": "b", "keep": 1, "layers": [0]}, {"blocks": "b", "layers": [1, 0]}):
        with pytest.raises(UsageProblem):
            check_table({"step": "drop-layers", **table}, DropLayers, text="", where="x")


def test_masks_and_grids_move_with_their_layers(deep: Source, deep_context: Context) -> None:
    """What was pruned and quantized before layers went must be found under the new names."""
    pruned, _ = prune(deep, Magnitude(step="magnitude", sparsity=0.5, include=("blocks.*",)), deep_context)
    rounded, _ = rtn(pruned, Rtn(step="rtn", bits=4, group="channel", include=("blocks.*",)), deep_context)
    student, _ = drop(rounded, DropLayers(step="drop-layers", blocks="blocks", layers=(1, 2)), deep_context)
    assert sorted(student.masks) == sorted(student.encodings) and "blocks.3.up.weight" not in student.masks
    assert torch.equal(student.masks["blocks.0.up.weight"], pruned.masks["blocks.1.up.weight"])
    assert all(lies_on(student.module.get_parameter(n), e) for n, e in student.encodings.items())


@pytest.mark.parametrize("bits", [2, 8])
def test_the_last_step_keeps_zeros_and_grids(deep: Source, deep_context: Context, bits: int) -> None:
    """After prune, quantize, distill: zeros are zero, weights lie on the same grids, and the loss has fallen."""
    pruned, _ = prune(deep, Magnitude(step="magnitude", sparsity=0.5, include=("blocks.*",)), deep_context)
    rounded, _ = rtn(pruned, Rtn(step="rtn", bits=bits, group=8, include=("blocks.*",)), deep_context)
    trained, report = apply(rounded, _distill(epochs=20), deep_context)
    assert report["weights_on_grids"] == 8 and report["loss_last"] < report["loss_first"]
    for name, mask in rounded.masks.items():
        weight, grid = trained.module.get_parameter(name), trained.encodings[name]
        assert not weight[~mask].any() and lies_on(weight, grid)
        assert torch.equal(grid.scale, rounded.encodings[name].scale)
    assert any(not torch.equal(trained.module.get_parameter(n), rounded.module.get_parameter(n))
               for n in rounded.masks)  # fmt: skip
    assert list(trained.module.state_dict()) == list(deep.module.state_dict())


def test_token_scaled_distillation_learns(deep: Source, deep_context: Context) -> None:
    """match "tsld" must take labels from the batches and add the model's own loss; without logits it is refused."""
    student, _ = drop(deep, DropLayers(step="drop-layers", blocks="blocks", keep=1), deep_context)
    _, report = apply(student, _distill(match="tsld", epochs=10), deep_context)
    assert report["loss_last"] < report["loss_first"] - 0.5 and report["alpha"] is None
    bare = dataclasses.replace(student, train_batches=None, loss=None)
    _, report = apply(bare, _distill(match="tsld", epochs=1), deep_context)
    assert report["data"] == "samples"


def test_relations_and_projections(tmp_path: Path, deep: Source, deep_context: Context) -> None:
    """A teacher of another width must teach hidden states through learned maps, and relations without."""
    student, _ = drop(deep, DropLayers(step="drop-layers", blocks="blocks", keep=2), deep_context)
    wide = _write(tmp_path, "wide", width=20)
    settings = _distill(teacher=wide.path, hidden={"blocks.1": "blocks.3"}, relations={"blocks.0.up": "blocks.0.up"},
                        alpha=1.0)  # fmt: skip
    trained, report = apply(student, settings, deep_context)
    assert report["loss_last"] < report["loss_first"] and report["teacher"] == "wide"
    assert list(trained.module.state_dict()) == list(student.module.state_dict())
    with pytest.raises(UsageProblem, match="relation_heads"):
        apply(student, settings.model_copy(update={"relation_heads": 7}), deep_context)
    with pytest.raises(UsageProblem, match="layers must be those of the teacher"):
        apply(student, settings.model_copy(update={"relations": {"blocks.0": "blocks.9"}}), deep_context)


def test_vocabularies_must_be_one(tmp_path: Path, deep: Source, deep_context: Context) -> None:
    """A teacher with another number of classes must be refused with both shapes."""
    other = _write(tmp_path, "other", classes=13)
    with pytest.raises(InputRefused, match=r"one vocabulary.*\[8, 6, 13\] of the teacher, \[8, 6, 11\]"):
        apply(deep, _distill(teacher=other.path), deep_context)


def test_the_teacher_runs_once(tmp_path: Path, deep: Source, deep_context: Context) -> None:
    """Over five epochs in five orders the teacher must run in the first only, and give the same weights as without."""
    student, _ = drop(deep, DropLayers(step="drop-layers", blocks="blocks", keep=2), deep_context)
    plain, _ = apply(student, _distill(epochs=5), deep_context)
    kept, report = apply(student, _distill(epochs=5, cache=str(tmp_path / "kept")), deep_context)
    again, second = apply(student, _distill(epochs=5, cache=str(tmp_path / "kept")), deep_context)
    assert (report["teacher_runs"], second["teacher_runs"]) == (4, 0)
    for name, weight in plain.module.named_parameters():
        torch.testing.assert_close(kept.module.get_parameter(name), weight, atol=1e-4, rtol=1e-3)
        assert torch.equal(kept.module.get_parameter(name), again.module.get_parameter(name))


def _rows(count: int) -> Iterator[dict[str, torch.Tensor]]:
    yield {"x": torch.arange(count * 2.0).view(count, 2)}


def test_a_cut_cache_is_cut_back(tmp_path: Path) -> None:
    """A record that a crash cut off must be dropped, the whole ones before it must serve."""
    batch = next(_rows(3))
    run = lambda: {"y": batch["x"] * 2}  # noqa: E731
    cache = TeacherCache(tmp_path, "t", ("y",))
    cache(batch, ("x",), run)
    cache.close()
    data = cache.path.read_bytes()
    cache.path.write_bytes(data[:-3])
    again = TeacherCache(tmp_path, "t", ("y",))
    assert torch.equal(again({"x": batch["x"][:2]}, ("x",), lambda: pytest.fail("kept rows"))["y"], batch["x"][:2] * 2)
    assert torch.equal(again(batch, ("x",), run)["y"], batch["x"] * 2) and again.misses == 1
    again.close()
    assert cache.path.read_bytes() == data


def test_a_damaged_cache_is_told(tmp_path: Path) -> None:
    """A flipped bit in what was kept must be an error that names the file, not another number."""
    batch = next(_rows(3))
    cache = TeacherCache(tmp_path, "t", ("y",))
    cache(batch, ("x",), lambda: {"y": batch["x"] * 2})
    cache.close()
    data = bytearray(cache.path.read_bytes())
    data[-1] ^= 1
    cache.path.write_bytes(data)
    again = TeacherCache(tmp_path, "t", ("y",))
    with pytest.raises(IntegrityBroken, match="teacher-"):
        again(batch, ("x",), lambda: pytest.fail("kept rows"))
    again.close()


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A place that is no folder must be an error that names it."""
    (tmp_path / "file").write_text("")
    with pytest.raises((EnvironmentLacking, NotADirectoryError, FileExistsError)):
        TeacherCache(tmp_path / "file", "t", ("y",))


def test_wrong_settings() -> None:
    """Settings that exclude one another must be refused when the recipe is read."""
    for table in (
        {"match": "mse", "temperature_end": 1.0}, {"match": "tsld", "alpha": 0.5}, {"cache_top_k": 4},
        {"cache": "x", "hidden": "blocks"}, {"match": "tsld", "temperature": 2.0},
    ):  # fmt: skip
        with pytest.raises(UsageProblem):
            check_table({"step": "distill", **table}, Distill, text="", where="x")


def test_measures_shrink(deep: Source, deep_context: Context) -> None:
    """Half the blocks must leave the parameters of the rest only."""
    student, _ = drop(deep, DropLayers(step="drop-layers", blocks="blocks", keep=2), deep_context)
    block = sum(p.numel() for p in deep.module.blocks[0].parameters())
    assert measure(deep, False)["parameters"] - measure(student, False)["parameters"] == 2 * block


def test_a_narrow_student_of_the_teacher(deep: Source, deep_context: Context, tmp_path: Path) -> None:
    """Half of the neurons must stay, the student learn from the teacher, and the folder travel."""
    student, report = narrow(deep, Narrow(step="narrow", neurons=0.5), deep_context)
    assert [(entry["before"], entry["after"]) for entry in report["layers"]] == [
        (before, before // 2) for before in [entry["before"] for entry in report["layers"]]
    ]
    assert len(report["layers"]) == 4 and {entry["units"] for entry in report["layers"]} == {"neurons"}
    before, after = (sum(p.numel() for p in s.module.parameters()) for s in (deep, student))
    assert after < 0.7 * before
    trained, done = apply(student, Distill(step="distill", epochs=3, learning_rate=0.003), deep_context)
    assert done["loss_last"] < done["loss_first"]
    save_compressed(dataclasses.replace(trained, original=deep.ref), deep, {}, tmp_path / "out", overwrite=False)
    again = open_compressed(ModelRef("compressed", "out", str(tmp_path / "out")))
    ids = next(iter(deep.samples()))["ids"]
    assert all(torch.equal(a, b) for a, b in zip(again.flat(ids), trained.flat(ids), strict=True))


def test_a_narrow_student_of_nothing_is_refused(deep: Source, deep_context: Context) -> None:
    """A table without shares, and a kind of unit that the model has not, must be refused."""
    with pytest.raises(UsageProblem, match="at least one of heads"):
        check_table({"step": "narrow"}, Narrow, text="", where="x")
    with pytest.raises(UsageProblem, match="of a kind that"):
        narrow(deep, Narrow(step="narrow", heads=0.5), deep_context)

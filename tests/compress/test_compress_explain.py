"""`compress --explain`: what steps would do is what they do, and nothing is written or changed."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from deploytool.cli.compress import _explained
from deploytool.cli.main import run
from deploytool.compress.explain import explain
from deploytool.compress.recipe import find_recipe, load_recipe, parse_recipe, recipe_names, step_tables
from deploytool.compress.run import compress
from deploytool.load.compressed import state_sha256
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.source import ModelRef, Source

STEPS = [{"step": "magnitude", "sparsity": 0.5, "include": ["up"]}, {"step": "svd", "rank": 4, "include": ["down"]},
         {"step": "distill", "epochs": 2}]  # fmt: skip


def test_what_is_told_is_what_happens(tiny: Source) -> None:
    """Tried steps must tell the layers, zeros and sizes of the real run, and leave the model as it is."""
    digest = state_sha256(tiny.module)
    recipe = parse_recipe({"compress": STEPS[:1]}, "", where="recipe")
    (told,) = explain(tiny, recipe)["explained"]
    _, report = compress(tiny, recipe)
    assert told["tried"] and told["layers"] == [row["layer"] for row in report["steps"][0]["layers"]]
    assert told["skipped"] == report["steps"][0]["skipped"]
    assert told["after"]["nonzeros"] == report["after"]["nonzeros"]
    assert 0 < told["output_change"] < 1 and state_sha256(tiny.module) == digest


def test_forecasts_follow_from_the_settings(tiny: Source) -> None:
    """Sizes of factors, counts of zeros and bits, and the steps of training must be countable by hand."""
    extra = [
        {"step": "wanda", "pattern": "2:4"},
        {"step": "rtn", "bits": 4, "group": 20},
        {"step": "svd", "budget": 0.5},
    ]
    told = explain(tiny, parse_recipe({"compress": STEPS + extra}, "", where="recipe"))["explained"]
    said = [" ".join(row["effect"]) for row in told]
    assert "208 of 480 weights remain" in said[1] and not told[1]["tried"]
    assert "8 optimizer steps over 4 batches" in said[2]
    assert "sets 50% of 960 weights in 2 layers" in said[3] and "grids of 4 bits: 3840 bytes" in said[4]
    assert "leaves 480 of 960 weights" in said[5]


def test_steps_that_were_not_tried_are_named_where_they_are_missing(tiny: Source) -> None:
    """What is told as if an earlier step had not run must say so; what follows steps that were tried says nothing."""
    steps = [STEPS[0], {"step": "magnitude", "sparsity": 0.6}, STEPS[1], {"step": "rtn", "bits": 4, "group": 20}]
    told = explain(tiny, parse_recipe({"compress": steps}, "", where="recipe"))
    assert [row["without"] for row in told["explained"]] == [[], [], [], [3]]
    assert told["explained"][1]["before"] == told["explained"][0]["after"]
    heads = [line for line in _explained(told) if not line.startswith(" ")]
    assert heads[2:] == ["svd: as its settings say", "rtn: as its settings say, as if step 3 (svd) had not run"]


def test_training_is_counted_as_it_will_be(tiny: Source) -> None:
    """Accumulated batches make one step, rounds count, and data that is lacking must be told as the step does."""
    steps = [
        {"step": "finetune", "epochs": 2, "accumulate": 3},
        {"step": "qat", "epochs": 3},
        {"step": "progressive", "sparsity": 0.5, "rounds": 2, "epochs": 2},
    ]
    told = explain(tiny, parse_recipe({"compress": steps}, "", where="recipe"))["explained"]
    said = [" ".join(row["effect"]) for row in told]
    assert "4 optimizer steps over 4 batches" in said[0]
    assert "12 optimizer steps over 4 batches" in said[1] and "grids of 8 bits" in said[1]
    assert "16 optimizer steps over 4 batches" in said[2] and "sets 50%" in said[2]
    bare = dataclasses.replace(tiny, train_batches=None)
    (told,) = explain(bare, parse_recipe({"compress": steps[:1]}, "", where="recipe"))["explained"]
    assert any("refused" in said for said in told["effect"])


LEAST: dict[str, dict[str, Any]] = {
    "narrow": {"neurons": 0.5}, "drop-layers": {"blocks": "blocks", "keep": 1}, "mixed-precision": {"mean_bits": 4.5},
    "svd": {"keep": 0.5}, "structured": {"remove": 0.5}, "local-attention": {"window": 2}, "tucker": {"keep": 0.5},
    **{step: {"sparsity": 0.5} for step in ("magnitude", "wanda", "sparsegpt", "progressive")},
}  # fmt: skip
NOT_OF_DIGITS = {"tucker", "low-rank-embedding", "plain-attention"}  # convolutions, embeddings, torch's attention


@pytest.mark.parametrize("step", sorted({*step_tables()} - NOT_OF_DIGITS))
def test_every_step_has_a_forecast(step: str) -> None:
    """What it does and what that costs must be told of every step that a vision transformer can take."""
    recipe = parse_recipe({"compress": [{"step": step, **LEAST.get(step, {})}]}, "", where="recipe")
    (told,) = explain(open_source(resolve("digits")), recipe)["explained"]
    assert len(told["effect"]) >= 2 and not any("no forecast" in said for said in told["effect"]), told["effect"]
    assert told["tried"] or any(re.search(r"about [\d.e+-]+ s", said) for said in told["effect"]), told["effect"]


def test_dropped_layers_are_counted() -> None:
    """drop-layers only copies, so it is tried: what stays is told, with the sizes of the real run."""
    recipe = parse_recipe({"compress": [{"step": "drop-layers", **LEAST["drop-layers"]}]}, "", where="recipe")
    (told,) = explain(open_source(resolve("digits")), recipe)["explained"]
    assert told["tried"] and re.fullmatch(r"keeps 1 of \d blocks", told["effect"][0])
    assert told["after"]["parameters"] < told["before"]["parameters"]


@pytest.mark.parametrize("name", [n for n in recipe_names() if n.startswith("digits")])
def test_shipped_recipes_are_explained(name: str) -> None:
    """Every step of the shipped recipes for digits must have something to say, as JSON."""
    told = explain(open_source(resolve("digits")), load_recipe(find_recipe(name)))
    assert all(row["effect"] for row in told["explained"])
    json.dumps(told, allow_nan=False)


def test_the_command_writes_nothing(tiny_ref: ModelRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --explain the command must need no output and write none; without it an output must be asked for."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[compress]]\nstep = "magnitude"\nsparsity = 0.5\n')
    before = sorted(tmp_path.rglob("*.toml")), sorted(p.name for p in tmp_path.iterdir())
    arguments = ["compress", dataclasses.asdict(tiny_ref)["path"], "--recipe", str(recipe)]
    assert run([*arguments, "--explain"]) == 0
    text = capsys.readouterr().out
    assert "magnitude: tried on a copy" in text and "would change up" in text and "would leave norm" in text
    assert "would leave :" not in text
    assert run([*arguments, "--explain", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["explained"][0]["tried"] is True
    assert run(arguments) == 2
    assert "-o must name" in capsys.readouterr().err
    left = sorted(tmp_path.rglob("*.toml")), sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__")
    assert left == before

"""Recipes: checked whole, with file, line and the nearest name, and without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from deploytool.compress.recipe import find_recipe, load_recipe, recipe_names, step_tables
from deploytool.errors import UsageProblem

GOOD = """
model = "digits"
targets = ["ort-int8"]

[[compress]]
step = "magnitude"
sparsity = 0.5

[[compress]]
step = "distill"
output = "logits"

[calibration]
samples = 16
length = 64

[quality]
max_drop = 0.02
"""


def _problems(tmp_path: Path, text: str) -> tuple[str, ...]:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageProblem) as caught:
        load_recipe(path)
    assert caught.value.code == "DT202"
    return tuple(line.replace(f"{path}:", "") for line in caught.value.detail)


def test_a_good_recipe_is_read_whole(tmp_path: Path) -> None:
    """Steps must come in their order with defaults filled in, and the other tables as written."""
    path = tmp_path / "r.toml"
    path.write_text(GOOD)
    recipe = load_recipe(path)
    assert [step.step for step in recipe.steps] == ["magnitude", "distill"]
    assert recipe.plan()[0] == {"step": "magnitude", "sparsity": 0.5, "pattern": None, "scope": "tensor",
                                "include": [], "exclude": []}  # fmt: skip
    assert recipe.plan()[1]["output"] == ["logits"]
    assert (recipe.model, recipe.targets) == ("digits", ("ort-int8",))
    assert (recipe.calibration.samples, recipe.calibration.length, recipe.quality.max_drop) == (16, 64, 0.02)


def test_all_errors_of_all_steps_come_at_once(tmp_path: Path) -> None:
    """Unknown keys in the file and in two steps must be named together, each with its line and the nearest key."""
    text = GOOD.replace("sparsity = 0.5", "sparsty = 0.5").replace("output =", "ouput =").replace("max_drop", "max_dro")
    problems = _problems(tmp_path, text + "\n[calibratio]\n")
    for part in ("7: unknown key 'compress.0.sparsty'; did you mean 'sparsity'?",
                 "11: unknown key 'compress.1.ouput'; did you mean 'output'?",
                 "18: unknown key 'quality.max_dro'; did you mean 'max_drop'?",
                 "20: unknown key 'calibratio'; did you mean 'calibration'?"):  # fmt: skip
        assert part in problems
    assert len(problems) == 4


def test_an_unknown_step_names_the_nearest(tmp_path: Path) -> None:
    """A misspelt step must be named with its line, beside the errors of the other steps."""
    problems = _problems(tmp_path, GOOD.replace('"magnitude"', '"magnitud"').replace("output =", "ouput ="))
    assert problems[0] == "6: unknown step 'magnitud'; did you mean 'magnitude'?"
    assert problems[1].startswith("11: unknown key 'compress.1.ouput'")


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ('step = "svd"', "exactly one of rank, energy, keep"),
        ('step = "svd"\nrank = 4\nkeep = 0.5', "exactly one of rank, energy, keep"),
        ('step = "magnitude"\nsparsity = 1.5', "less than 1"),
        ('step = "magnitude"', "one of sparsity and pattern"),
        ('step = "wanda"\nsparsity = 1.0', "less than 1"),
        ('step = "sparsegpt"\nsparsity = -0.1', "greater than or equal to 0"),
        ('step = "wanda"\npattern = "2;4"', "N:M"),
        ('step = "wanda"\npattern = "4:4"', "N:M"),
        ('step = "sparsegpt"\npattern = "2:4"\nsparsity = 0.6', "0.5 as pattern 2:4 says"),
        ('step = "magnitude"\npattern = "2:4"\nscope = "global"', 'scope must be "tensor"'),
        ('step = "magnitude"\nsparsity = "half"', "valid number"),
        ('step = "distill"\nmatch = "mse"\ntemperature = 2.0', "temperature must be left out"),
        ("sparsity = 0.5", "missing key 'step'"),
    ],
)
def test_wrong_values_are_refused(tmp_path: Path, step: str, sentence: str) -> None:
    """A value out of range, of the wrong type or in contradiction to another must be an error that says so."""
    assert any(sentence in line for line in _problems(tmp_path, f"[[compress]]\n{step}\n"))


def test_compress_must_be_a_list_of_tables(tmp_path: Path) -> None:
    """`[compress]` instead of `[[compress]]` must be an error, not an empty recipe."""
    assert "list" in _problems(tmp_path, '[compress]\nstep = "svd"\n')[0]


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_right(name: str) -> None:
    """Every shipped recipe must load and hold steps."""
    assert load_recipe(find_recipe(name)).steps


def test_an_unknown_recipe_names_the_nearest() -> None:
    """A name that is neither shipped nor a file must be refused with the nearest shipped one."""
    with pytest.raises(UsageProblem, match="recipe must be") as caught:
        find_recipe("digits-prun")
    assert "digits-prune" in caught.value.detail[0]


def test_every_step_has_its_code() -> None:
    """The file that a step's table names must exist: a recipe that is accepted can be run."""
    root = Path(__file__).parents[2]
    for name, table in step_tables().items():
        assert (root / f"{table.code.replace('.', '/')}.py").is_file(), name


def test_recipes_are_checked_without_torch() -> None:
    """Reading a recipe must import no torch: dry runs and error messages come at once."""
    code = "import sys, deploytool.compress.recipe as r; r.load_recipe(r.find_recipe('digits-prune')); " \
           "sys.exit('torch' in sys.modules)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

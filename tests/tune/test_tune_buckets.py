"""A search that ships the best artifact for every size, packed as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from planted_search import Planted

from deploytool.artifact import Artifact
from deploytool.bundle.buckets import open_buckets
from deploytool.cases import Case, case_files
from deploytool.cli.main import run
from deploytool.compress.recipe import load_recipe
from deploytool.errors import InputRefused
from deploytool.target import load_target
from deploytool.tune.buckets import best_per_bucket
from deploytool.tune.search import Search
from deploytool.tune.space import Config, bases
from deploytool.tune.store import Store
from deploytool.tune.trial import Question, Trial

TARGETS = ("ort", "openvino", "torchscript")
TIMES = {  # of the short and of the long bucket
    "ort": (10.0, 20.0),
    "openvino": (13.0, 16.0),
    "torchscript": (9.9, 40.0),
}


def times(config: Config, case: int) -> float:
    return TIMES[config.profile.name][case] * (2.0 if "runtime.threads" in dict(config.changes) else 1.0)


@pytest.mark.parametrize(
    ("drops", "best"),
    [
        ({}, ["ort", "openvino"]),
        ({"openvino": 0.5}, ["ort", "ort"]),
    ],
)
def test_every_size_gets_its_own(drops: dict[str, float], best: list[str], tmp_path: Path) -> None:
    """Per size the quickest that keeps the quality; the chosen one where none is quicker by more than 2 %."""
    cases = [tmp_path / "0.npz", tmp_path / "1.npz"]
    for case in cases:
        Case({"x": np.ones(1, dtype=np.float32)}).save(case)
    planted = Planted(tmp_path, drops)
    planted.times = times
    with Store(tmp_path) as store:
        question = Question("latency", 0.01, 600.0, ("short", "long"), pack=True)
        search = Search(planted, planted, store, question, cases, lambda line: None)  # type: ignore[arg-type]
        chosen = search.run(bases([load_target(name) for name in TARGETS], ()))
        found = best_per_bucket(search, chosen)
    assert [t.config.profile.name for t in found] == best
    assert chosen.config.profile.name in best


def test_the_command_packs_them(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle's runner takes what fits and refuses the rest; every profile that made it stands in the project."""
    for module in ("torch", "onnxruntime"):
        pytest.importorskip(module)
    out = tmp_path / "best"

    def another(search: Search, chosen: Trial) -> list[Trial]:
        """As it is found, and then another one for the smaller size whatever its speed."""
        assert len(best_per_bucket(search, chosen)) == 2
        return [next(t for t in search.valued() if search.key(t) != search.key(chosen) and search.fit(t)), chosen]

    monkeypatch.setattr("deploytool.tune.run.best_per_bucket", another)
    for name, few in (("station._SLOT_SECONDS", 0.005), ("search._HEATS", (1, 1, 1, 1)), ("search._FINAL_ROUNDS", 2)):
        monkeypatch.setattr(f"deploytool.tune.{name}", few)
    asked = ["--at", "batch=1", "--at", "batch=2", "--max-drop", "100%", "--bench-seconds", "0", "--budget", "5m"]
    assert run(["tune", model, "-t", "ort", *asked, "--pack", "-o", str(out), "--json", "-q"]) == 0
    packed = json.loads(capsys.readouterr().out)["packed"]
    assert [bucket["sizes"] for bucket in packed["buckets"]] == [{"batch": 1}, {"batch": 2}]
    assert len({bucket["target"] for bucket in packed["buckets"]}) == 2
    case = Case.load(case_files(Artifact.load(out / "chosen").folder / "golden")[0])
    (name,) = case.inputs
    rows = np.repeat(case.inputs[name][:1], 3, axis=0)
    with open_buckets(Path(packed["bundle"])) as runner:
        one, two = runner.run({name: rows[:1]}), runner.run({name: rows[:2]})
        np.testing.assert_allclose(two["output"][:1], one["output"], atol=1e-5)
        with pytest.raises(InputRefused, match="fit into a bucket"):
            runner.run({name: rows})
    for command in (["verify", packed["bundle"], "--model", model], ["bundle", "selftest", packed["bundle"]],
                    ["package", packed["bundle"], "-o", str(tmp_path / "again.tar")]):  # fmt: skip
        assert run(command) == 0, command
    assert len(load_recipe(out / "deploytool.toml").targets) == 2


@pytest.mark.parametrize(
    "asked", [[], ["--at", "batch=1", "--objective", "size"], ["--at", "batch=1", "--at", "batch=1"]]
)
def test_packing_needs_sizes(asked: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without sizes, where no time is measured, or with one size twice there is nothing to pack by."""
    assert run(["tune", model, "-t", "ort", "--pack", *asked]) == 2
    assert "--pack must stand with" in capsys.readouterr().err

"""The search itself, on a workshop and a track whose answers are planted: the best must be found at little cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.errors import BackendFailed, CheckFailed
from deploytool.signature import Signature, TensorSpec
from deploytool.target import load_target
from deploytool.tune import space
from deploytool.tune.search import Question, Search
from deploytool.tune.space import Config, bases, everything
from deploytool.tune.store import Store, digest
from deploytool.tune.track import Entrant
from deploytool.tune.workshop import Product

SIGNATURE = Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
PARITY = {"cases": 1, "outputs": {"y": {"cosine": 1.0}}}
TARGETS = ("ort", "ort-int8", "openvino", "torchscript", "openvino-int8")


def milliseconds(config: Config, case: int) -> float:
    """What a configuration takes: int8 is quicker, more so with nothing kept in fp32; threads and buckets matter."""
    base = {"ort": 10.0, "ort-int8": 7.0, "openvino": 9.0, "torchscript": 16.0, "openvino-int8": 8.5}
    changes = dict(config.changes)
    time = base[config.profile.name] * (case + 1)
    time *= 0.9 if changes.get("build.keep_fp32") == 0 else 1.0
    time *= 0.95 if changes.get("build.reduce_range") is False else 1.0
    time *= 0.97 if changes.get("build.preset") == "performance" else 1.0
    return time * (1.6 if changes.get("runtime.threads") == 1 else 0.98 if "runtime.spinning" in changes else 1.0)


class Planted:
    """Workshop and track in one: what was built, evaluated and timed is counted."""

    def __init__(self, folder: Path, drops: Mapping[str, float], noise: float):
        self.folder, self.drops, self.noise = folder, drops, noise
        self.configs: dict[str, Config] = {}
        self.built: list[str] = []
        self.evaluated: list[str] = []
        self.rounds = 0
        self.fails: dict[str, Exception] = {}

    def product(self, config: Config) -> Product:
        build = " ".join([config.profile.name, *(f"{k}={v}" for k, v in config.changes if k.startswith("build."))])
        if build in self.fails:
            raise self.fails[build]
        if build not in self.built:
            self.built.append(build)
        self.configs[digest([build, config.runtime])[:16]] = config
        kept = {"kept_fp32": ["a", "b"]} if config.profile.precision == "int8" else {}
        artifact = Artifact(self.folder, "planted", "onnx", "m", config.profile.precision, SIGNATURE, settings=kept)
        return Product(artifact, build, PARITY, (), {})

    def quality(self, config: Config, product: Product, max_drop: float) -> tuple[dict[str, Any], list[str]]:
        self.evaluated.append(config.name)
        drop = max([d for name, d in self.drops.items() if name in config.name], default=0.0)
        return {"quality": {}, "generation": None, "drop": drop, "drop_of": "m"}, [
            "too much"
        ] if drop > max_drop else []

    def round(self, entrants: Sequence[Entrant], rng: np.random.Generator) -> dict[str, Any]:
        self.rounds += 1
        ms = {}
        for entrant in entrants:
            noise = np.exp(self.noise * rng.standard_normal((2, 2)))
            ms[entrant.key] = [
                [milliseconds(self.configs[entrant.key], case) * e for e in noise[case]] for case in range(2)
            ]
        joules = {key: [[100 / ms for ms in turns] for turns in cases] for key, cases in ms.items()}
        return {"ms": ms, "joules": joules, "guard": [1.0, 1.0]}

    def peak_rss_bytes(self, entrant: Entrant) -> int:
        return 3_000_000 if self.configs[entrant.key].profile.backend == "torchscript" else 4_000_000

    def close(self, key: str) -> None: ...

    def clear(self) -> None: ...


Ask = Callable[..., tuple[Search, Any, Planted]]


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Search over planted answers; gives the search, what was chosen, and what it cost."""
    monkeypatch.setattr(space, "usable_cores", lambda: 2)
    monkeypatch.setattr(space, "environment", lambda: {"cpu_flags": ["avx512_vnni"]})

    def run(
        drops: Mapping[str, float] | None = None, noise: float = 0.01, fails: Mapping[str, Exception] | None = None,
        seed: int = 0, **asked: Any,
    ) -> tuple[Search, Any, Planted]:  # fmt: skip
        cases = [tmp_path / "0.npz", tmp_path / "1.npz"]
        for case in cases:
            Case({"x": np.ones(1, dtype=np.float32)}).save(case)
        planted = Planted(tmp_path, drops or {}, noise)
        planted.fails = dict(fails or {})
        how = {"objective": "latency", "max_drop": 0.01, "budget_seconds": 600.0, **asked}
        question = Question(buckets=("short", "long"), seed=seed, **how)
        (tmp_path / f"store-{seed}").mkdir(exist_ok=True)
        with Store(tmp_path / f"store-{seed}") as store:
            search = Search(planted, planted, store, question, cases, lambda line: None)  # type: ignore[arg-type]
            return search, search.run(bases([load_target(name) for name in TARGETS], ())), planted

    return run


def best_of_all(fit: Callable[[Config], bool] = lambda config: True) -> float:
    """The time of the best configuration there is."""
    every = [c for name in TARGETS for c in everything(Config(load_target(name)), "latency") if fit(c)]
    return min(milliseconds(c, 0) for c in every)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_is_found(ask: Ask, seed: int) -> None:
    """Under 1 % of noise the choice is at most 2 % slower than the best of all combinations, without building all."""
    search, chosen, planted = ask(seed=seed)
    assert milliseconds(chosen.config, 0) <= 1.02 * best_of_all()
    builds = {c.target.model_copy(update={"runtime": None}).model_dump_json() for name in TARGETS
              for c in everything(Config(load_target(name)), "latency")}  # fmt: skip
    assert len(planted.built) <= 0.65 * len(builds) and len(planted.evaluated) < len(search.trials)


def test_what_loses_too_much_is_out(ask: Ask) -> None:
    """The quickest that keeps the quality is chosen, also when that was not known while searching."""
    _, chosen, _ = ask(drops={"keep_fp32=0": 0.2})
    assert milliseconds(chosen.config, 0) <= 1.02 * best_of_all(lambda c: "keep_fp32=0" not in c.name)
    assert "keep_fp32=0" not in chosen.config.name
    _, chosen, _ = ask(drops={"int8": 0.02}, seed=1)
    assert chosen.config.profile.name == "openvino"


def test_nothing_keeps_the_quality(ask: Ask) -> None:
    """When everything loses too much the search fails, and says of each what is wrong."""
    with pytest.raises(CheckFailed) as caught:
        ask(drops={"": 0.5})
    assert caught.value.code == "DT106" and caught.value.exit_code == 1
    assert any("ort: too much" in line for line in caught.value.detail)


def test_a_failing_build_is_no_end(ask: Ask) -> None:
    """What cannot be built is told with its reason, and the rest is searched."""
    search, chosen, _ = ask(fails={"ort-int8": BackendFailed("DT504", "it must build")})
    assert chosen.config.profile.name != "ort-int8"
    assert search.figures(search.trials["ort-int8"])["status"] == "refused"
    assert search.trials["ort-int8"].reason == "it must build"


def test_slow_on_one_size_is_out(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is best on average but slower than the best plain one at one size is not chosen."""
    quick = milliseconds

    def uneven(config: Config, case: int) -> float:
        if config.profile.precision == "int8":
            return 11.0 if case == 0 else 4.0
        return quick(config, case)

    monkeypatch.setitem(globals(), "milliseconds", uneven)
    _, chosen, _ = ask()
    assert chosen.config.profile.precision == "fp32"


def test_a_second_run_measures_nothing(ask: Ask) -> None:
    """The same search in the same folder takes every figure from the record and chooses the same."""
    _, first, planted = ask()
    assert planted.rounds > 0
    _, again, second = ask()
    assert second.rounds == 0 and again.config == first.config and again.value == first.value


def test_a_small_budget_is_kept(ask: Ask) -> None:
    """Without time nothing but the first configuration is tried, and the search says so."""
    search, chosen, _ = ask(budget_seconds=1e-6)
    assert list(search.trials) == ["ort"] and chosen.config.name == "ort" and search.out_of_time


def test_other_objectives(ask: Ask) -> None:
    """For memory the leanest process is chosen, for energy what takes fewest joules, however slow."""
    _, lean, _ = ask(objective="memory", seed=1)
    assert lean.config.profile.backend == "torchscript"
    _, frugal, _ = ask(objective="energy", seed=2)
    assert frugal.config.profile.name == "torchscript"  # the slowest here takes least

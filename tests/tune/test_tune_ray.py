"""A search on a Ray cluster: two nodes on this machine, each with a process of its own."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import planted_search
import pytest
from planted_search import Planted, PlantedStation

from deploytool.cases import Case
from deploytool.cli.main import run
from deploytool.errors import EnvironmentLacking
from deploytool.target import load_target
from deploytool.tune import ray_cluster, space
from deploytool.tune.ray_cluster import Cluster, cluster, import_ray
from deploytool.tune.search import Search
from deploytool.tune.space import bases
from deploytool.tune.station import Terms
from deploytool.tune.store import Store
from deploytool.tune.track import Entrant
from deploytool.tune.trial import Question
from deploytool.worker import NO_LIMITS

TARGETS = ("ort", "ort-int8", "openvino", "torchscript")
CPU_OF = (2, 1)  # of each node, as Ray is told


class Planter(PlantedStation):
    """A planted station that tells who did what when, and dies of one target."""

    def __init__(self, terms: Terms):
        super().__init__()
        self.folder = terms.folder

    def race(self, entrant: Entrant, anchor: Entrant, count: int, seed: Sequence[int]) -> dict[str, Any]:
        started = time.monotonic()
        if entrant.artifact.settings["lean"] and (self.folder / "deadly").exists():
            os._exit(9)
        found = super().race(entrant, anchor, count, seed)
        time.sleep(0.05)
        self.tell("race", started)
        return found

    def round(self, members: Sequence[Entrant], seed: Sequence[int], *, fresh: bool = False) -> dict[str, Any]:
        mark = self.folder / "deadly-once"
        if mark.exists():
            mark.unlink()
            os._exit(9)
        return super().round(members, seed)

    def tell(self, what: str, started: float) -> None:
        with (self.folder / "log").open("a") as file:
            file.write(json.dumps([os.getpid(), what, started, time.monotonic()]) + "\n")


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where a cluster of two nodes is reached."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        pytest.importorskip("ray", reason="ray is not installed: pip install 'deploytool[ray]'")
        # A worker that Ray starts ahead, for a session that ends at once, would keep its place for a minute.
        patch.setenv("RAY_prestart_worker_first_driver", "0")
        patch.setenv("RAY_enable_worker_prestart", "0")
        patch.setenv("RAY_worker_register_timeout_seconds", "15")
        import_ray(None)
        from ray import cloudpickle
        from ray.cluster_utils import Cluster as Nodes

        for module in (planted_search, sys.modules[__name__]):  # the nodes do not see the folder of the tests
            cloudpickle.register_pickle_by_value(module)
        how = {"object_store_memory": 80_000_000, "num_cpus": CPU_OF[0]}
        nodes = Nodes(initialize_head=True, head_node_args={**how, "include_dashboard": False})
        try:
            nodes.add_node(**{**how, "num_cpus": CPU_OF[1]})
            yield nodes.address
        finally:
            nodes.shutdown()


@pytest.fixture
def terms(tmp_path: Path) -> Terms:
    cases = tuple(tmp_path / name for name in ("0.npz", "1.npz"))
    for case in cases:
        Case({"x": np.ones(1, dtype=np.float32)}).save(case)
    return Terms(tmp_path, cases, NO_LIMITS, 0)


def search(terms: Terms, engine: Any, store: str) -> tuple[Search, Any, Planted]:
    """A search over planted products at the stations of `engine`."""
    shop = Planted(terms.folder, {})
    question = Question("latency", 0.01, 600.0, ("short", "long"))
    (terms.folder / store).mkdir(exist_ok=True)
    with Store(terms.folder / store) as record:
        found = Search(shop, engine or shop, record, question, terms.cases, lambda line: None)  # type: ignore[arg-type]
        return found, found.run(bases([load_target(name) for name in TARGETS], ())), shop


def rows(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(f"file:{folder / 'tune.sqlite'}?mode=ro", uri=True)) as database:
        return database.execute("SELECT key, kind FROM done ORDER BY rowid").fetchall()


def test_without_ray_or_with_an_address_for_nothing(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing ray is exit code 4 with the command that installs it; an address without it is a mistake."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run(["tune", model, "-t", "ort", "--engine", "ray"]) == 4
    said = capsys.readouterr().err
    assert "DT401" in said and "pip install 'deploytool[ray]'" in said
    assert run(["tune", model, "-t", "ort", "--address", "auto"]) == 2
    assert "--address must stand with --engine ray" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_two_nodes_choose_what_one_station_chooses(address: str, terms: Terms, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same figures and choice, both nodes at work, one piece at once on each; a second run measures nothing."""
    monkeypatch.setattr(space, "environment", lambda: {"cpu_flags": ["avx512_vnni"]})
    alone, first, _ = search(terms, None, "alone")
    with cluster(terms, address, lambda line: None, Planter) as engine:
        assert engine.width == 2
        together, second, _ = search(terms, engine, "together")
        assert (second.config, second.value) == (first.config, first.value)
        assert {n: together.figures(t) for n, t in together.trials.items()} == {
            n: alone.figures(t) for n, t in alone.trials.items()
        }
        done, told = rows(terms.folder / "together"), (terms.folder / "log").read_text()
        again, third, _ = search(terms, engine, "together")
        assert third.config == first.config and again.rounds == together.rounds
        assert rows(terms.folder / "together") == done and (terms.folder / "log").read_text() == told
    by_process: dict[int, list[tuple[float, float]]] = {}
    for pid, _, start, end in map(json.loads, told.splitlines()):
        by_process.setdefault(pid, []).append((start, end))
    assert len(by_process) == 2
    for spans in by_process.values():
        assert all(a[1] <= b[0] for a, b in zip(sorted(spans), sorted(spans)[1:], strict=False))


def test_a_killed_worker_costs_a_trial(address: str, terms: Terms) -> None:
    """What a worker died of is out with its reason, the next piece finds a new worker; a round is done once more."""
    (terms.folder / "deadly").touch()
    said: list[str] = []
    with cluster(terms, address, said.append, Planter) as engine:
        found, chosen, _ = search(terms, engine, "killed")
        assert engine.run("clear") is None
        (terms.folder / "deadly-once").touch()
        entrant = Entrant("e", Planted(terms.folder, {}).product(chosen.config).artifact, {})
        assert engine.run("round", members=[entrant], seed=[1])["ms"]["e"]
        for member in list(engine._members.values()):
            engine._ray.kill(member)
        engine.clear()
        assert len(engine._members) == engine.width == 2
    figures = found.figures(found.trials["torchscript"])
    assert figures["status"] == "refused" and "it died" in str(figures["reason"])
    assert chosen.config.profile.name == "ort-int8"
    (terms.folder / "deadly").unlink()
    with cluster(terms, address, said.append, Planter) as engine:  # what was killed is tried again, nothing else
        before = rows(terms.folder / "killed")
        again, _, _ = search(terms, engine, "killed")
    assert again.trials["torchscript"].value is not None
    after = rows(terms.folder / "killed")
    assert after[: len(before)] == before and ("race" in {kind for _, kind in after[len(before) :]})


def test_nodes_that_cannot_take_part(address: str, terms: Terms, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes unlike this machine are left out with the reason, and without any the search ends; so with no cluster."""
    monkeypatch.setattr(ray_cluster, "machine", lambda: {"cpu": "another"})
    said: list[str] = []
    with pytest.raises(EnvironmentLacking, match="like this machine") as caught:
        cluster(terms, address, said.append, Planter).__enter__()
    assert caught.value.code == "DT406" and len(said) == 2 and "another kind of machine" in said[0]
    with pytest.raises(EnvironmentLacking, match="must be reachable"):
        cluster(terms, "127.0.0.1:1", said.append, Planter).__enter__()


def test_the_command_on_two_nodes(address: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real builds on the nodes give what this machine gives; where that is known already nothing is done again."""
    pytest.importorskip("torch")
    asked = ["tune", model, "-t", "torchscript", "--objective", "size", "--max-drop", "100%",
             "--bench-seconds", "0", "--json", "-q"]  # fmt: skip
    there = ["--engine", "ray", "--address", address]
    found = []
    for out, engine in (("here", []), ("there", there), ("here", there)):
        assert run([*asked, "-o", str(tmp_path / out), *engine]) == 0
        found.append(json.loads(capsys.readouterr().out))
        found[-1]["rows"] = rows(tmp_path / "here")
    assert [f["chosen"]["name"] for f in found] == [found[0]["chosen"]["name"]] * 3
    assert [f["configurations"] for f in found] == [found[0]["configurations"]] * 3
    assert found[2]["rows"] == found[0]["rows"]
    assert not list(tmp_path.glob("*/.work-*"))


def test_the_nodes_are_let_go(address: str, terms: Terms) -> None:
    """After a search the cluster is free for the next one, also when it ended by an error."""
    with pytest.raises(KeyboardInterrupt), cluster(terms, address, lambda line: None, Planter):
        raise KeyboardInterrupt
    with cluster(terms, address, lambda line: None, Planter) as engine:
        assert isinstance(engine, Cluster) and engine.width == 2

"""What an export needs at least is told before work starts; what cannot fit is refused, and nothing else."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest

from deploytool.cli.main import run
from deploytool.errors import EnvironmentLacking
from deploytool.pipeline import needs as preflight
from deploytool.pipeline.export import Options, make_plan
from deploytool.pipeline.needs import Needs, needs, refuse_impossible, weights_of
from deploytool.source import ModelRef
from deploytool.target import load_target
from deploytool.tune.run import make_plan as plan_search
from deploytool.worker import NO_LIMITS, Limits

GB = 1_000_000_000
Usage = namedtuple("Usage", "total used free")


MADE = """
import torch

def build():
    return torch.nn.Linear(32, 32, bias=False).eval()

def samples():
    return [{"input": torch.ones(n, 32)} for n in (1, 2)]
"""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 GB of memory and 10 GB of disk are free."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(20 * GB, 10 * GB, 10 * GB))
    free = psutil.virtual_memory()._replace(available=10 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(preflight, "_CGROUP_LIMIT", Path("/nowhere"))


def sparse(folder: Path, size: int) -> Path:
    """A model folder with weights of this size, which take no space."""
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return folder


def test_weights_are_found(tmp_path: Path) -> None:
    """Of several formats the largest counts, an ONNX file with its data is one, and other files count nothing."""
    sizes = {"a.safetensors": 30, "b.safetensors": 30, "old.bin": 50, "tokenizer.json": 900, "model.py": 9,
             "model.safetensors": 7, "graph.onnx": 2, "graph.onnx.data": 40}  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"0" * size)
    assert weights_of(ModelRef("huggingface", "m", str(tmp_path))) == 67
    assert weights_of(ModelRef("python", "model", str(tmp_path / "model.py"))) == 7
    assert weights_of(ModelRef("onnx", "graph", str(tmp_path / "graph.onnx"))) == 42
    assert weights_of(ModelRef("huggingface", "hub", "owner/name")) == 0


def test_what_is_counted() -> None:
    """The cache holds the graph, the output an engine per target in its precision, memory the weights twice."""
    found = needs(4 * GB, [load_target(n) for n in ("ort", "ort-int8", "eager")], graph=True)
    assert (found.cache, found.output) == (4 * GB, 5 * GB)
    assert found.memory > 8 * GB
    shares = {"ort": 32, "ort-fp16": 16, "ort-int8": 8, "ort-weight-int8": 8, "ort-int4": 4, "openvino-int4": 4,
              "inductor": 64, "inductor-int8": 16}
    assert {name: needs(32 * GB, [load_target(name)], graph=False).output for name in shares} == {
        name: bits * GB for name, bits in shares.items()
    }


@pytest.mark.parametrize(
    ("memory", "cache", "output", "limits", "said"),
    [
        (9 * GB, 4 * GB, 5 * GB, NO_LIMITS, None),
        (11 * GB, 0, 0, NO_LIMITS, "memory: at least 11000 MB"),
        (0, 6 * GB, 6 * GB, NO_LIMITS, "disk: at least 12000 MB"),
        (2 * GB, 0, 0, Limits(None, GB), "--memory-limit is 1000 MB"),
    ],
)
def test_what_cannot_fit_is_refused(
    machine: None, memory: int, cache: int, output: int, limits: Limits, said: str | None, tmp_path: Path
) -> None:
    """Exactly what exceeds the machine, or the user's own limit, is refused as a matter of the environment."""
    if said is None:
        refuse_impossible(Needs(memory, cache, output), tmp_path / "out", limits)
        return
    with pytest.raises(EnvironmentLacking) as caught:
        refuse_impossible(Needs(memory, cache, output), tmp_path / "out", limits)
    assert caught.value.code == "DT405" and caught.value.exit_code == 4 and said in str(caught.value)


def test_a_container_is_a_limit(machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a container may take bounds memory; a container without a limit does not."""
    for limit, refused in ((str(GB), True), ("max", False)):
        (tmp_path / "limit").write_text(limit)
        monkeypatch.setattr(preflight, "_CGROUP_LIMIT", tmp_path / "limit")
        if refused:
            with pytest.raises(EnvironmentLacking, match="must hold"):
                refuse_impossible(Needs(2 * GB, 0, 0), tmp_path, NO_LIMITS)
        else:
            refuse_impossible(Needs(2 * GB, 0, 0), tmp_path, NO_LIMITS)


def test_a_plan_is_refused_before_work(machine: None, tmp_path: Path) -> None:
    """A folder with 6 GB of weights is refused here before anything is loaded or written; the plan tells the needs."""
    folder = sparse(tmp_path / "huge", 6 * GB)
    with pytest.raises(EnvironmentLacking) as caught:
        make_plan(str(folder), ["ort"], Options(out=tmp_path / "out"))
    assert caught.value.code == "DT405" and not (tmp_path / "out").exists()
    how = Options(out=tmp_path / "out")
    told = make_plan("digits", ["ort"], how).to_json(how)["needs_at_least_bytes"]
    assert told["memory"] > told["output"] > 0


def test_what_a_model_file_holds_is_known_once_it_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Weights made by build() are in no file: targets that need no graph are refused before any is built."""
    model = tmp_path / "made.py"
    model.write_text(MADE)
    monkeypatch.setattr(preflight, "_places", lambda needed, out: [("the output", tmp_path, needed.output * 10**9)])
    told = ["export", str(model), "--target", "torchscript", "--no-bench", "-o", str(tmp_path / "out")]
    assert run(told) == 4
    assert "DT405" in (said := capsys.readouterr().err) and "4096000 MB are needed for the output" in said


def test_a_search_is_refused_before_work(machine: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of 1 GB of weights a graph and two engines need 2.25 GB; a search that goes on has its graph and builds there."""
    model, out = str(sparse(tmp_path / "large", GB)), tmp_path / "out"

    def plan(free: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(20 * GB, 0, int(free * GB)))
        plan_search(model, ["ort", "ort-int8"], [], [], out)

    plan(2.3)
    with pytest.raises(EnvironmentLacking, match="must hold") as caught:
        plan(2.2)
    assert caught.value.code == "DT405" and "at least 2250 MB" in str(caught.value) and not out.exists()
    out.mkdir()
    (out / "tune.sqlite").touch()
    plan(0.1)


def test_a_compression_is_refused_before_work(
    machine: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Weights that do not fit into memory are not compressed."""
    model, out = sparse(tmp_path / "huge", int(9.95 * GB)), tmp_path / "out"
    assert run(["compress", str(model), "--recipe", "digits-svd", "-o", str(out)]) == 4
    told = capsys.readouterr().err
    assert "DT405" in told and "memory: at least 10070 MB" in told and not out.exists()

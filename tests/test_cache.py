"""Prepared models are found again when nothing changed, and made again when anything did."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploytool import cache, worker
from deploytool.cache import Prepared, prepare
from deploytool.errors import DeployError, EnvironmentLacking, InputRefused
from deploytool.source import ModelRef
from deploytool.storage import sha256_file

MODEL = """
import torch
from torch import nn
from neighbour_of_cached import WIDTH

def build():
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, 2)
    layer.load_state_dict(torch.load({weights!r}))
    return layer

def samples():
    return [{{"input": torch.ones(1, WIDTH)}}]
"""


class Made:
    """Stands in for the worker: fills the folder with what the real one writes, and counts."""

    def __init__(self, dependencies: list[Path]) -> None:
        self.dependencies = dependencies
        self.calls: list[dict[str, Any]] = []
        self.during: Callable[[Path], None] = lambda folder: None

    def __call__(self, name: str, function: str, /, limits: Any = None, **arguments: Any) -> Any:
        assert function == "deploytool.lower.prepare:prepare_job"
        self.calls.append(arguments)
        folder = Path(arguments["out"])
        self.during(folder)
        for file in ("prepared.json", "signature.json", "onnx/model.onnx", "cases/000.npz"):
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps({"number": len(self.calls)}))
        found = {path: sha256_file(path) if path.is_file() else None for path in self.dependencies}
        return {"dependencies": {str(path): digest for path, digest in found.items()}}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A cache of its own, and the files of a model."""
    monkeypatch.setenv("DEPLOYTOOL_CACHE", str(tmp_path / "cache"))
    found = {name: tmp_path / name for name in ("m.py", "neighbour_of_cached.py", "weights.pt")}
    for path in found.values():
        path.write_text("as it was")
    return found


@pytest.fixture
def made(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> Made:
    stand_in = Made(list(files.values()))
    monkeypatch.setattr(worker, "run", stand_in)
    return stand_in


@pytest.fixture
def ref(files: dict[str, Path]) -> ModelRef:
    return ModelRef("python", "m", str(files["m.py"]))


def lowered() -> list[str]:
    return sorted(p.name for p in (worker.cache_folder() / "lowered").iterdir())


def test_an_unchanged_model_is_found(made: Made, ref: ModelRef) -> None:
    """The second time nothing is made, and the fingerprint is the same."""
    first, second = prepare(ref), prepare(ref)
    assert (first.cached, second.cached, len(made.calls)) == (False, True, 1)
    assert (first.folder, first.fingerprint, first.info) == (second.folder, second.fingerprint, second.info)


@pytest.mark.parametrize("name", ["m.py", "neighbour_of_cached.py", "weights.pt"])
def test_a_changed_file_is_noticed(name: str, made: Made, ref: ModelRef, files: dict[str, Path]) -> None:
    """Another content of any file that the model was read from is another model, also when its time is the same."""
    first = prepare(ref)
    before = files[name].stat()
    files[name].write_text("as it is!")
    os.utime(files[name], ns=(before.st_atime_ns, before.st_mtime_ns))
    second = prepare(ref)
    assert not second.cached and second.fingerprint != first.fingerprint
    files[name].unlink()
    made.dependencies.remove(files[name])
    assert not prepare(ref).cached


def test_a_touched_file_is_the_same(made: Made, ref: ModelRef, files: dict[str, Path]) -> None:
    """Content counts, not time."""
    prepare(ref)
    os.utime(files["weights.pt"])
    assert prepare(ref).cached


def test_a_file_that_nothing_wrote_is_hashed_once(
    made: Made, ref: ModelRef, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lay still since before it was hashed is not hashed again; what was written since is, whatever its time."""
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    prepare(ref)
    monkeypatch.setattr(cache, "sha256_file", counted)
    monkeypatch.setattr(cache, "_CLOCK_NS", 0)
    names = sorted(path.name for path in files.values())
    time.sleep(0.02)
    assert prepare(ref).cached and sorted(n for n in hashed if n in names) in ([], names)
    del hashed[:]
    assert prepare(ref).cached and not set(hashed) & set(names)
    weights = files["weights.pt"]
    before = weights.stat()
    weights.write_text("as it is!")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not prepare(ref).cached


def test_a_file_just_written_is_hashed_again(made: Made, ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system's clock is coarse: a second write at the same time as the first must not be missed."""
    prepare(ref)
    monkeypatch.setattr(cache, "sha256_file", lambda path: "another")
    assert not prepare(ref).cached


def test_options_and_versions_are_part_of_the_key(
    made: Made, ref: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another exporter, seed, library or code of ours must not be served what the other made."""
    kept = {prepare(ref).folder, prepare(ref, exporter="dynamo").folder, prepare(ref, seed=1).folder}
    assert len(kept) == len(made.calls) == 3
    assert prepare(ref, seed=1).cached and prepare(ref).cached
    for name, value in (("_versions", lambda: {"torch": "99"}), ("_code", lambda: [["load/new.py", "0"]])):
        with monkeypatch.context() as patch:
            patch.setattr(cache, name, value)
            assert not prepare(ref).cached
        assert not prepare(ref).cached  # its one entry now is the other's


def test_unused_on_request(made: Made, ref: ModelRef) -> None:
    """Without the cache it is made anew, and kept for the next time."""
    prepare(ref)
    assert not prepare(ref, use=False).cached and prepare(ref).cached and len(made.calls) == 2


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3])


def _same_size(path: Path) -> None:
    time.sleep(0.01)
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("name", ["prepared.json", "onnx/model.onnx", "cases/000.npz"])
@pytest.mark.parametrize("spoil", [Path.unlink, _truncate, _same_size])
def test_a_damaged_entry_is_made_again(
    name: str, spoil: Callable[[Path], None], made: Made, ref: ModelRef
) -> None:
    """A file that is gone, cut short or overwritten must be noticed before it is used."""
    spoil(prepare(ref).folder / name)
    again = prepare(ref)
    assert not again.cached and again.info["number"] == 2
    assert json.loads((again.folder / name).read_text()) == {"number": 2}
    assert prepare(ref).cached and len(lowered()) == 1


def test_files_added_later_stay(made: Made, ref: ModelRef) -> None:
    """The pipeline keeps its own figures beside: they are no damage."""
    (prepare(ref).folder / "quality.json").write_text("{}")
    assert prepare(ref).cached


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"dependencies": 3}', '{"dependencies": [], "folder": "x"}'])
def test_a_damaged_index_is_no_entry(text: str, made: Made, ref: ModelRef) -> None:
    """A list of dependencies that cannot be read is as good as none."""
    prepare(ref)
    (index,) = (worker.cache_folder() / "index").glob("*.json")
    index.write_text(text)
    assert not prepare(ref).cached and prepare(ref).cached


def test_an_interrupted_preparation_leaves_nothing(made: Made, ref: ModelRef) -> None:
    """What ends in the middle, by an error or a signal, must leave no entry and no half of one, and no lock."""

    def stop(error: BaseException) -> Callable[[Path], None]:
        def during(folder: Path) -> None:
            (folder / "prepared.json").write_text("{}")
            raise error

        return during

    for error in (KeyboardInterrupt(), InputRefused("DT305", "it must be (got not)")):
        made.during = stop(error)
        with pytest.raises(type(error)):
            prepare(ref)
        assert lowered() == [] and not list((worker.cache_folder() / "index").glob("*.json"))
    made.during = lambda folder: None
    assert not prepare(ref).cached


def test_what_a_killed_process_left_goes_after_a_day(made: Made, ref: ModelRef) -> None:
    """Half an entry is not found, is left alone while it may be somebody's, and goes when it is old."""
    root = worker.cache_folder() / "lowered"
    for name, age in ((".tmp-old", 100_000), (".tmp-new", 10)):
        (root / name).mkdir(parents=True)
        os.utime(root / name, (time.time() - age,) * 2)
    prepare(ref)
    assert ".tmp-new" in lowered() and ".tmp-old" not in lowered()


def test_a_superseded_entry_goes_when_nobody_can_read_it(
    made: Made, ref: ModelRef, files: dict[str, Path]
) -> None:
    """A model that is edited again and again must not fill the disk, nor lose what another run is reading."""
    first = prepare(ref).folder
    files["m.py"].write_text("second")
    second = prepare(ref).folder
    assert first.is_dir()
    os.utime(second, (time.time() - 7200,) * 2)
    files["m.py"].write_text("third")
    prepare(ref)
    assert not second.is_dir()


def test_two_at_once_make_it_once(made: Made, ref: ModelRef) -> None:
    """While one prepares, another waits and then finds it."""
    made.during = lambda folder: time.sleep(0.3)
    found: list[Prepared] = []
    threads = [threading.Thread(target=lambda: found.append(prepare(ref))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.cached for p in found) == [False, True, True] and len(made.calls) == 1


def test_a_lock_that_stays_is_told(made: Made, ref: ModelRef, monkeypatch: pytest.MonkeyPatch) -> None:
    """When another process never gives the entry free, that is said with the lock's name."""
    monkeypatch.setattr(cache, "_LOCK_SECONDS", 0.05)
    seen: list[DeployError] = []

    def during(folder: Path) -> None:
        def second() -> None:
            try:
                prepare(ref)
            except DeployError as error:
                seen.append(error)

        thread = threading.Thread(target=second)
        thread.start()
        thread.join()

    made.during = during
    prepare(ref)
    assert isinstance(seen[0], EnvironmentLacking) and seen[0].code == "DT404"


PARENT = """
import sys, json
from deploytool.cache import prepare
from deploytool.source import ModelRef
from deploytool.storage import sha256_file
found = prepare(ModelRef("python", "m", sys.argv[1]))
print(json.dumps([found.cached, found.fingerprint, sorted({"torch", "onnx", "transformers"} & set(sys.modules))]))
"""


def test_a_real_model_is_found_without_torch(files: dict[str, Path], tmp_path: Path) -> None:
    """A real model file with a neighbour and weights: found again by a process that never imports torch, until its
    weights change."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("onnxscript")
    files["m.py"].write_text(MODEL.format(weights=str(files["weights.pt"])))
    files["neighbour_of_cached.py"].write_text("WIDTH = 3\n")
    torch.save(torch.nn.Linear(3, 2).state_dict(), files["weights.pt"])

    def run() -> Any:
        done = subprocess.run([sys.executable, "-c", PARENT, str(files["m.py"])], capture_output=True, text=True,
                              check=False, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    first, second = run(), run()
    assert (first[0], second[0], first[1]) == (False, True, second[1]) and first[2] == second[2] == []
    torch.save(torch.nn.Linear(3, 2).state_dict(), files["weights.pt"])
    third = run()
    assert not third[0] and third[1] != first[1]

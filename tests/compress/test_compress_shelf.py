"""What calibration keeps for each sample: it comes back as it was, memory holds little of it, and nothing is left."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from deploytool.compress import shelf as shelf_module
from deploytool.compress.shelf import Shelf, fresh
from deploytool.errors import EnvironmentLacking

linux = pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")


class _Box:
    def __init__(self, value: Tensor) -> None:
        self.value = value


def _thing(number: int, mask: Tensor) -> Any:
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(number))
    odd = {"turned": x.T, "one row": x[:1].expand(3, 4), "part": x[2:4, 1], "none": None, "empty": x[:0]}
    return (x, mask, _Box(x)), odd, [x.bfloat16(), x > 0, "text", 2.5, torch.float16]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf_module, "_IN_MEMORY", 0)


@pytest.mark.usefixtures("on_disk")
def test_things_come_back_as_they_were() -> None:
    """Values, strides and types, tensors in objects, and what is one tensor in several places or several things."""
    mask = torch.ones(6)
    shelf = Shelf((_thing(number, mask) for number in range(4)), expected=4)
    assert len(shelf) == 4 and len(shelf._places) == 3
    for number in range(4):
        for found in (shelf[number], fresh(shelf, number)):
            (x, its_mask, box), odd, rest = found
            (right, _, _), wanted, others = _thing(number, mask)
            assert torch.equal(x, right) and box.value is x and rest[3:] == others[3:]
            assert all(torch.equal(rest[i], others[i]) and rest[i].dtype == others[i].dtype for i in (0, 1))
            for name, value in wanted.items():
                assert odd[name] is None if value is None else torch.equal(odd[name], value)
                assert value is None or (odd[name].stride() == value.stride() and odd[name].dtype == value.dtype)
            assert torch.equal(its_mask, mask)
        assert shelf[number][0][1] is mask and fresh(shelf, number)[0][1] is not mask
    assert torch.equal(shelf[-1][0][0], shelf[3][0][0]) and len(shelf[1:3]) == 2 and len(list(shelf)) == 4


def test_what_is_fresh_may_be_written_into(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory or on disk, of a shelf or a list: the thing itself must stay as it is."""
    for limit in (0, 2**20):
        monkeypatch.setattr(shelf_module, "_IN_MEMORY", limit)
        things: Any
        for things in (Shelf([torch.zeros(3), torch.ones(3)]), [torch.zeros(3), torch.ones(3)]):
            for number in range(2):
                fresh(things, number).fill_(7)
                assert things[number].tolist() == [number] * 3


@pytest.mark.usefixtures("on_disk")
def test_what_cannot_be_pickled_stays() -> None:
    """A lock among a call's arguments must not keep the model from being calibrated."""
    things = [(torch.ones(2), threading.Lock() if number == 1 else None) for number in range(3)]
    shelf = Shelf(things)
    assert shelf[1] is things[1] and shelf[2][0].tolist() == [1, 1] and list(shelf._held) == [0, 1]


@pytest.mark.usefixtures("on_disk")
def test_a_disk_without_room_is_told_before_it_is_full(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The room for all that are expected must be there at the first, or the folder, the need and a way out be named."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    room = {str(tmp_path): SimpleNamespace(free=10 * 4000 - 1)}
    monkeypatch.setattr(shutil, "disk_usage", room.__getitem__)
    assert len(Shelf((torch.zeros(1000) for _ in range(10)), expected=10)) == 10
    with pytest.raises(EnvironmentLacking, match=f"{tmp_path} must hold") as caught:
        Shelf((torch.zeros(1000) for _ in range(2)), expected=11)
    assert caught.value.code == "DT405" and "TMPDIR" in str(caught.value.fix)


@pytest.mark.usefixtures("on_disk")
def test_a_disk_that_fills_up_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system says while writing must become the same clear error."""

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shelf_module, "_write", full)
    with pytest.raises(EnvironmentLacking, match="No space left"):
        Shelf([torch.zeros(3), torch.zeros(3)])


@linux
@pytest.mark.usefixtures("on_disk")
def test_the_file_has_no_name_and_goes_with_the_shelf(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that is killed can leave nothing behind, and a shelf that is dropped keeps no file open."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def opened() -> int:
        links = [Path(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    shelf = Shelf([torch.zeros(3), torch.zeros(3)])
    assert opened() == 1 and not list(tmp_path.iterdir())
    del shelf
    gc.collect()
    assert opened() == 0


_PROGRAM = '''
import dataclasses, json, re, sys
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as attend
from deploytool.compress.recipe import parse_recipe
from deploytool.compress.step import Calibration, Context
from deploytool.load.flat import FlatModule
from deploytool.signature import Signature, TensorSpec
from deploytool.source import ModelRef, Source
import importlib

WIDTH, TOKENS, few, many = 128, 256, *map(int, sys.argv[2:4])

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.first, self.second = Attention(), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(self.first(x))
        return x + self.down(torch.relu(self.up(self.second(x))))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        x = self.table(x)
        for block in self.layers:
            x = block(x)
        return x.mean(dim=1)

def samples(count):
    for number in range(count):
        yield {"x": torch.randint(50, (1, TOKENS), generator=torch.Generator().manual_seed(number))}

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def calibrate(step, count):
    torch.manual_seed(0)
    module = Model().eval().requires_grad_(False)
    signature = Signature((TensorSpec("x", "int64", (1, TOKENS)),), (TensorSpec("output", "float32", (1, WIDTH)),))
    flat = FlatModule(module, ("x",), ("output",))
    source = Source(ModelRef("python", "small", "/small.py"), module, flat, signature, samples=lambda: samples(count))
    settings = parse_recipe({"compress": [step]}, "", where="test").steps[0]
    context = Context(source, Calibration(samples=count), 0, lambda line: None)
    importlib.import_module(settings.code).apply(source, settings, context)

torch.set_num_threads(1)
found = {}
for step in json.loads(sys.argv[1]):
    calibrate(step, 2)  # what libraries and allocators take once
    peaks = []
    for count in (few, many):
        open("/proc/self/clear_refs", "w").write("5")  # the peak so far is forgotten
        calibrate(step, count)
        peaks.append(peak())
    found[json.dumps(step)] = peaks
print(json.dumps(found))
'''
_GRID = {"bits": 4, "group": 32}
_STEPS: tuple[dict[str, Any], ...] = (
    {"step": "wanda", "sparsity": 0.5}, {"step": "sparsegpt", "sparsity": 0.5},
    {"step": "sparsegpt", "sparsity": 0.5, "repair": True}, {"step": "gptq", **_GRID}, {"step": "awq", **_GRID},
    {"step": "svd", "keep": 0.5, "whiten": True}, {"step": "structured", "remove": 0.25},
    {"step": "fnet"},
)  # fmt: skip


@linux
def test_ten_times_the_samples_take_the_same_memory() -> None:
    """Steps that look at samples, with 10 and 100: what reaches one block of all of them is 13 MB, what turns keep of a
    block several times as much, and memory may hold next to nothing of either."""
    run = subprocess.run([sys.executable, "-c", _PROGRAM, json.dumps(_STEPS), "10", "100"], capture_output=True,
                         text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    grown = {step: (many - few) / 1e6 for step, (few, many) in json.loads(run.stdout).items()}
    assert len(grown) == len(_STEPS) and max(grown.values()) < 5, grown

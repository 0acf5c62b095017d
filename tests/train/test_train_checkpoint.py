"""Checkpoints: killed and resumed training gives the same bits; foreign, damaged and unwritable ones are told."""

from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import CheckFailed, EnvironmentLacking, InputRefused, IntegrityBroken
from deploytool.train.checkpoint import Saving, latest, sha256
from deploytool.train.loop import Trained, fit
from deploytool.train.schedule import Schedule
from deploytool.train.stream import Batch

SCHEDULE = Schedule(3, 0.02, seed=5, warmup_steps=2)


def _model(width: int = 8, seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.5), nn.Linear(width, 1)).eval()


def _batches(epoch: int) -> Iterator[Batch]:
    """Drawn from the global generator, as careless model files do."""
    for _ in range(5):
        x = torch.randn(16, 4)
        yield {"x": x, "y": x.sum(1, keepdim=True) * random.random()}


def _train(model: nn.Module, folder: Path | None, schedule: Schedule = SCHEDULE, stop: int | None = None) -> Trained:
    steps = 0

    def loss(batch: Batch) -> Tensor:
        nonlocal steps
        steps += 1
        if steps == stop:
            raise KeyboardInterrupt
        return (model(batch["x"]) - batch["y"]).square().mean()

    return fit(model, _batches, loss, schedule, saving=Saving(folder, 2) if folder else None)


def test_stopped_anywhere_and_resumed(tmp_path: Path) -> None:
    """Wherever training is broken off, going on must give the very weights, buffers and losses of one run."""
    whole = _model()
    losses = _train(whole, None).losses
    for stop in (1, 4, 5, 11, 15):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            _train(_model(), folder, stop=stop)
        again = _model()
        trained = _train(again, folder)
        assert trained.losses == losses and trained.resumed_from == (stop - 1) // 2 * 2
        assert sha256(again.state_dict()) == sha256(whole.state_dict())
        assert len(list(folder.iterdir())) <= 2


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    """A run that finds the last checkpoint of its training must take the weights and train no further."""
    one, two = _model(), _model()
    _train(one, tmp_path)
    assert _train(two, tmp_path, stop=1).resumed_from == 15
    assert sha256(one.state_dict()) == sha256(two.state_dict())


def test_going_on_is_told(tmp_path: Path) -> None:
    """Whoever watches must learn that weights come from a checkpoint, of which step, and where it is."""
    for said in ([], ["goes on from step 4 of 15", str(tmp_path)], ["was finished before", str(tmp_path)]):
        lines: list[str] = []
        model, stop = _model(), 6 if not said else 99
        steps = iter(range(1, 100))

        def loss(batch: Batch, model: nn.Module = model, stop: int = stop, steps: Iterator[int] = steps) -> Tensor:
            if next(steps) == stop:
                raise KeyboardInterrupt
            return (model(batch["x"]) - batch["y"]).square().mean()

        with suppress(KeyboardInterrupt):
            fit(model, _batches, loss, SCHEDULE, saving=Saving(tmp_path, 2), progress=lines.append)
        assert all(any(part in line for line in lines) for part in said)
        assert said or not any("before" in line or "goes on" in line for line in lines)


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import torch
from test_train_checkpoint import _batches, _model, SCHEDULE
from deploytool.train.checkpoint import Saving, sha256
from deploytool.train.loop import fit
model, calls = _model(), iter(range(1000))
def loss(batch):
    if next(calls) == 1:
        print("one step is kept", flush=True)
    time.sleep(0.004)
    return (model(batch["x"]) - batch["y"]).square().mean()
schedule = SCHEDULE.__class__(12, 0.02, seed=5)
fit(model, _batches, loss, schedule, saving=Saving(Path(sys.argv[2]), 1))
print(sha256(model.state_dict()), flush=True)
"""


def _child(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(Path(__file__).parent), str(folder)],
                            stdout=subprocess.PIPE, text=True)  # fmt: skip


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """Killed with SIGKILL again and again while it trains and saves, the end must have the bits of a quiet run."""
    with _child(tmp_path / "quiet") as quiet:
        expected = quiet.communicate()[0].split()[-1]
    moments, kills = random.Random(7), 0
    for _ in range(30):
        with _child(tmp_path / "killed") as process:
            assert process.stdout is not None and process.stdout.readline() == "one step is kept\n"
            if kills < 2:
                time.sleep(moments.uniform(0.02, 0.12))
                process.send_signal(signal.SIGKILL)
            said = process.communicate()[0]
            if process.returncode == 0:
                break
            assert any((tmp_path / "killed").glob("step-*.safetensors"))
            kills += 1
    assert kills == 2 and said.strip() == expected


def test_a_foreign_checkpoint_is_refused(tmp_path: Path) -> None:
    """Checkpoints of other weights, of another shape or of another schedule must be refused, saying what differs."""
    _train(_model(), tmp_path)
    for model, schedule, what in (
        (_model(seed=1), SCHEDULE, "model"), (_model(9), SCHEDULE, "model"), (_model(), Schedule(4, 0.02), "schedule"),
    ):  # fmt: skip
        with pytest.raises(InputRefused, match="of this training") as caught:
            _train(model, tmp_path, schedule)
        assert caught.value.code == "DT315" and caught.value.detail[0].startswith(what)


def test_checkpoints_of_other_data_are_refused(tmp_path: Path) -> None:
    """One number of one batch that differs must be enough, and one batch more or less too."""
    model = _model()

    def fitted(batches: list[Batch]) -> None:
        fit(model, lambda epoch: batches, lambda batch: model(batch["x"]).square().mean(), Schedule(2, 0.02),
            saving=Saving(tmp_path, 2))  # fmt: skip

    data: list[Batch] = [{"x": torch.ones(16, 4) * number} for number in range(3)]
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted(data)
    other = torch.zeros(16, 4)
    other[15, 3] = 1e-6
    for changed in ([{"x": other}, *data[1:]], data[:2], [data[1], data[0], data[2]]):
        model.load_state_dict(start)
        with pytest.raises(InputRefused) as caught:
            fitted(changed)
        assert caught.value.code == "DT315" and any("training data" in line for line in caught.value.detail)
    model.load_state_dict(start)
    fitted(data)


def test_a_damaged_checkpoint_is_told_and_the_one_before_serves(tmp_path: Path) -> None:
    """One flipped bit must be found; without the damaged file training goes on from the one before, to the same end."""
    whole = _model()
    _train(whole, tmp_path)
    newest = sorted(tmp_path.iterdir())[-1]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    with pytest.raises(IntegrityBroken, match="SHA-256") as caught:
        _train(_model(), tmp_path)
    assert "goes on from step-000000014" in str(caught.value)
    newest.write_bytes(data[:50])
    with pytest.raises(IntegrityBroken):
        latest(tmp_path)
    newest.unlink()
    again = _model()
    assert _train(again, tmp_path).resumed_from == 14 and sha256(again.state_dict()) == sha256(whole.state_dict())


def test_no_room_for_a_checkpoint(tmp_path: Path) -> None:
    """When the disk takes no more, the error must name the file, and the checkpoint before must stay whole."""
    with pytest.raises(KeyboardInterrupt):
        _train(_model(), tmp_path, stop=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(EnvironmentLacking, match=r"step-000000004.*must be writable"):
            _train(_model(), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    found = latest(tmp_path)
    assert found is not None and len(found.state["losses"]) == 2


def test_divergence_names_step_and_last_good_checkpoint(tmp_path: Path) -> None:
    """A loss that becomes NaN must end training, naming the step and the checkpoint before it, which must be finite."""
    model = _model()
    values = iter([1.0] * 4 + [float("nan")])
    with pytest.raises(CheckFailed, match="at step 5 of 15") as caught:
        fit(model, _batches, lambda b: model(b["x"]).mean() * next(values), SCHEDULE, saving=Saving(tmp_path, 2))
    assert caught.value.detail == (f"last good checkpoint: step 4, {tmp_path / 'step-000000004.safetensors'}",)
    found = latest(tmp_path)
    assert found is not None and all(t.isfinite().all() for t in found.tensors.values() if t.is_floating_point())


def test_leftovers_of_a_killed_writer_go(tmp_path: Path) -> None:
    """Half a file that a killed process left must vanish with the next checkpoint and never be read."""
    (tmp_path / ".step-000000002.safetensors.tmp-abc").write_bytes(b"half")
    _train(_model(), tmp_path)
    assert not list(tmp_path.glob(".*"))

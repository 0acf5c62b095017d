"""Two or four gloo processes that torchrun starts: every way of sharing must train as one process does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import UsageProblem
from deploytool.train.checkpoint import Saving
from deploytool.train.loop import fit
from deploytool.train.parallel import first_process, join, spread, wait_for_all
from deploytool.train.schedule import Parallel, Schedule
from deploytool.train.stream import IGNORED, Batch

MODES = {"data": 1, "sharded": 1, "tensor": 2}  # and how many batches one process takes per step


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(torch.relu(self.up(self.norm(x)))))


class Model(nn.Module):
    """Blocks, a tied head, and a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return cast(Tensor, self.head(x))


def train(mode: Parallel, accumulate: int, saving: Saving | None = None) -> dict[str, Tensor]:
    """The weights after 12 steps; seven batches an epoch, so that the last step of each is a short one."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, mask = Model(), torch.rand(32, 16) > 0.5

    def batches(epoch: int) -> list[Batch]:
        draws = [torch.randint(0, 11, (4, 6)) for _ in range(7)]
        return [{"ids": i, "target": torch.where(torch.rand(4, 6) < 0.3, IGNORED, (i + 1) % 11)} for i in draws]

    def loss(batch: Batch) -> Tensor:
        return nn.functional.cross_entropy(model(batch["ids"]).flatten(0, 1), batch["target"].flatten())

    schedule = Schedule(3, 0.01, accumulate=accumulate, parallel=mode)
    trained = fit(model, batches, loss, schedule, masks={"blocks.0.up.weight": mask}, saving=saving)
    assert not model.blocks[0].up.weight[~mask].any() and type(model) is Model
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return {**weights, "losses": torch.tensor(trained.losses), "resumed_from": torch.tensor(trained.resumed_from)}


def _together(folder: Path) -> None:
    """What each of the processes runs."""
    torch.set_num_threads(1)
    if os.environ["WORLD_SIZE"] == "4":
        results = {"sharded+tensor": train("sharded+tensor", 1)}
        if first_process():
            torch.save(results, folder / "results.pt")
        return
    results = {mode: train(cast(Parallel, mode), accumulate) for mode, accumulate in MODES.items()}
    kept = Saving(folder / "kept", 5)
    train("sharded", 1, kept)
    if first_process():
        sorted(kept.folder.iterdir())[-1].unlink()  # the finished one: go on from step 10
    wait_for_all()
    results["resumed"] = train("sharded", 1, kept)
    if first_process():
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """By way of sharing, what two processes trained, and four where groups of two share layers."""
    found: dict[str, dict[str, Tensor]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    for processes in ("2", "4"):
        folder = tmp_path_factory.mktemp("parallel")
        subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "--standalone",
                        __file__, str(folder)], check=True, env=environment, timeout=180)  # fmt: skip
        found |= torch.load(folder / "results.pt")
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    return train("data", 2)


@pytest.mark.parametrize("mode", [*MODES, "resumed", "sharded+tensor"])
def test_processes_train_as_one(mode: str, results: dict[str, dict[str, Tensor]], alone: dict[str, Tensor]) -> None:
    """Weights and losses of several processes must equal those of one with the doubled batch to 1e-4, dropout
    included; sharded training that is resumed too."""
    for name, value in alone.items():
        if name != "resumed_from":
            torch.testing.assert_close(results[mode][name], value, atol=1e-5 if mode == "data" else 1e-4, rtol=0)
    assert results[mode]["resumed_from"] == (10 if mode == "resumed" else 0)


def test_one_process_needs_no_mesh() -> None:
    """Without torchrun every mode must be plain training in this process."""
    module = nn.Linear(2, 2)
    for mode in ("data", "sharded", "tensor", "sharded+tensor"):
        team = join(cast(Parallel, mode))
        assert (team.size, team.parts, team.mesh) == (1, 1, None)
        with spread(module, team):
            assert type(module) is nn.Linear


def test_groups_must_be_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes cannot make groups of two: refused before anything is shared."""

    class State:
        device, process_index, num_processes = torch.device("cpu"), 0, 3

    monkeypatch.setattr("deploytool.train.parallel._state", State)
    with pytest.raises(UsageProblem, match="multiple of 2 processes"):
        join("sharded+tensor")


def test_a_missing_package_is_told_with_its_extra() -> None:
    """Training without accelerate must end as a lack of the environment, and name what installs it."""
    code = "import sys; sys.modules['accelerate'] = None; import deploytool.train.parallel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "EnvironmentLacking" in done.stderr and "pip install 'deploytool[train]'" in done.stderr


if __name__ == "__main__":
    _together(Path(sys.argv[1]))

"""The compress command started by torchrun and by accelerate: two processes, one folder, one voice."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress
from deploytool.load.compressed import WEIGHTS, open_compressed
from deploytool.load.model import open_source
from deploytool.source import ModelRef

RECIPE = """[[compress]]
step = "finetune"
epochs = 3
learning_rate = 0.01
{more}
[training]
checkpoints = "kept"
every_steps = 2
"""


STARTERS = {
    "torchrun": ("torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "deploytool"),
    "accelerate": ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "deploytool"),
}  # fmt: skip


@pytest.mark.parametrize("starter", STARTERS)
def test_two_processes_write_what_one_does(starter: str, tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Two processes must write one folder with the weights of one process and the doubled batch, keep checkpoints, and
    print one report, whoever starts them."""
    recipe = tmp_path / "two.toml"
    recipe.write_text(RECIPE.format(more=""))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", *STARTERS[starter], "compress", tiny_ref.path, "--recipe", str(recipe), "-o", "out",
         "--json", "-q"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    report = json.loads(done.stdout)
    assert report["steps"][0]["processes"] == 2 and report["steps"][0]["optimizer_steps"] == 6
    assert sorted(p.name for p in (tmp_path / "kept" / "01-finetune").iterdir()) == [
        "step-000000004.safetensors", "step-000000006.safetensors",
    ]  # fmt: skip
    two = open_compressed(ModelRef("compressed", "out", str(tmp_path / "out")))
    text = RECIPE.format(more="accumulate = 2").partition("[training]")[0]
    one, _ = compress(open_source(tiny_ref), parse_recipe({"compress": [{
        "step": "finetune", "epochs": 3, "learning_rate": 0.01, "accumulate": 2}]}, text, where="one"))  # fmt: skip
    for name, weight in one.module.named_parameters():
        torch.testing.assert_close(two.module.get_parameter(name), weight, atol=1e-5, rtol=0)


def _on_two_machines(tmp_path: Path, model: str, recipe: str) -> list[subprocess.CompletedProcess[str]]:
    """The command in two processes that stand in folders of their own, where relative paths mean other disks."""
    (tmp_path / "recipe.toml").write_text(recipe)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "RANK": str(rank),
                       "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}  # fmt: skip
        started.append(subprocess.Popen(
            [sys.executable, "-m", "deploytool", "compress", model, "--recipe", str(tmp_path / "recipe.toml"), "-o",
             "out", "--json", "-q"], cwd=tmp_path / str(rank), env=environment, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ))  # fmt: skip
    told = [process.communicate(timeout=120) for process in started]
    return [subprocess.CompletedProcess(p.args, p.returncode, *t) for p, t in zip(started, told, strict=True)]


def test_machines_without_a_common_disk_write_one_folder(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Both must end well, with the folder where the first one stands and nothing where the other does."""
    recipe = RECIPE.format(more="").partition("[training]")[0]
    first, second = _on_two_machines(tmp_path, tiny_ref.path, recipe)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    stored = (tmp_path / "0" / "out" / WEIGHTS).stat().st_size
    assert json.loads(first.stdout)["stored_bytes"] == stored and not (tmp_path / "1" / "out").exists()


def test_checkpoints_that_not_all_machines_see_are_refused(tiny_ref: ModelRef, tmp_path: Path) -> None:
    """Both must end at once, as the environment's fault, and leave no trace where they looked."""
    first, second = _on_two_machines(tmp_path, tiny_ref.path, RECIPE.format(more=""))
    assert (first.returncode, second.returncode) == (4, 4), first.stderr + second.stderr
    assert "1 of 2 do not see" in first.stderr + first.stdout and not list((tmp_path / "0" / "kept").iterdir())

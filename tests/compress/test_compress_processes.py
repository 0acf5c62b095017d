"""The compress command started by torchrun and by accelerate: two processes, one folder, one voice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deploytool.compress.recipe import parse_recipe
from deploytool.compress.run import compress
from deploytool.load.compressed import open_compressed
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

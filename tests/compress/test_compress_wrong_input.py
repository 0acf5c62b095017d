"""What users do wrong with `deploytool compress`: the documented exit code, one document that says it, nothing left."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deploytool.cli.main import run

MODEL = """
import torch
from torch import nn
from torch.nn.functional import mse_loss

WIDTH = 10
INPUTS = {"x": ("batch", "tokens", 12)}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 40), nn.Linear(40, WIDTH)

    def forward(self, x):
        return {"logits": self.down(torch.relu(self.up(x)))}


def build():
    torch.manual_seed(0)
    return Small()


def samples():
    return [{"x": torch.ones(n, 3, 12)} for n in (1, 2)]


def calibration():
    return [{"x": torch.ones(2, 3, 12)}]


def train_batches():
    return [{"x": torch.ones(4, 3, 12), "target": torch.zeros(4, 3, WIDTH)} for _ in range(3)]


def loss(outputs, batch):
    return mse_loss(outputs["logits"], batch["target"])
"""
TRAIN = "epochs = 1\nlearning_rate = 0.01\n"
CASES: dict[str, tuple[str, str, tuple[str, str], tuple[int, str, str]]] = {
    "all zeros": ("magnitude", "sparsity = 1.0", ("", ""), (2, "DT202", "less than 1")),
    "fewer zeros than none": ("wanda", "sparsity = -0.1", ("", ""), (2, "DT202", "greater than or equal to 0")),
    "no such layer": ("wanda", 'sparsity = 0.5\ninclude = ["block*"]', ("", ""), (2, "DT204", "block*")),
    "rank": ("svd", "rank = 13", ("", ""), (2, "DT204", "rank must be at most the smaller side")),
    "pattern": ("sparsegpt", 'pattern = "3:5"', ("", ""), (2, "DT204", "must divide the row length")),
    "heads": ("distill", TRAIN + 'relation_heads = 7\nrelations = { up = "up" }', ("", ""),
              (2, "DT204", "relation_heads divides")),
    "no samples": ("wanda", "sparsity = 0.5", ('[{"x": torch.ones(2, 3, 12)}]', "[]"),
                   (3, "DT303", "at least one sample")),
    "NaN in a sample": ("wanda", "sparsity = 0.5", ("torch.ones(2, 3, 12)", "torch.full((2, 3, 12), torch.nan)"),
                        (3, "DT303", "must be finite")),
    "NaN in the loss": ("finetune", TRAIN, ("return mse", "return torch.nan * mse"), (1, "DT105", "step 1")),
    "nothing to train on": ("finetune", TRAIN, ("def train_batches", "def others"), (3, "DT313", "train_batches")),
    "another vocabulary": ("distill", TRAIN + 'teacher = "./wide.py"', ("", ""), (3, "DT303", "one vocabulary")),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mistakes_end_with_their_code(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Settings that do not fit the model, and data that cannot be used, must be told in one document; no folder."""
    step, settings, change, (code, error, said) = CASES[name]
    monkeypatch.chdir(tmp_path)
    Path("wide.py").write_text(MODEL.replace("WIDTH = 10", "WIDTH = 11"))
    Path("m.py").write_text(MODEL.replace(*change))
    Path("r.toml").write_text(f'[[compress]]\nstep = "{step}"\n{settings}\n')
    assert run(["compress", "m.py", "--recipe", "./r.toml", "-o", "out", "--json"]) == code
    printed = capfd.readouterr()
    told = json.loads(printed.out)["error"]
    assert told["code"] == error and said in json.dumps(told) and "Traceback" not in printed.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.py", "r.toml", "wide.py"]


def test_checkpoints_of_another_model_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Checkpoints that another model left must be refused, and stay as they are."""
    monkeypatch.chdir(tmp_path)
    Path("m.py").write_text(MODEL)
    Path("r.toml").write_text(f'[[compress]]\nstep = "finetune"\n{TRAIN}[training]\ncheckpoints = "kept"\n')
    assert run(["compress", "m.py", "--recipe", "./r.toml", "-o", "out", "--json"]) == 0
    before = {path: path.read_bytes() for path in Path("kept").rglob("*.safetensors")}
    Path("m.py").write_text(MODEL.replace("WIDTH = 10", "WIDTH = 11"))
    capfd.readouterr()
    assert run(["compress", "m.py", "--recipe", "./r.toml", "-o", "other", "--json"]) == 3
    assert "another model" in json.dumps(json.loads(capfd.readouterr().out)["error"])
    assert before and before == {path: path.read_bytes() for path in Path("kept").rglob("*.safetensors")}
    assert not Path("other").exists()

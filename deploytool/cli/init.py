"""deploytool init"""

from __future__ import annotations

from pathlib import Path

import click

from deploytool.cli import options
from deploytool.errors import UsageProblem
from deploytool.storage import write_bytes

_MODEL = '''"""What this model is, in one line: `deploytool inspect` shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

# Names of the axes that may have any size; axes with a number always have that size.
INPUTS = {"input": ("batch", 16)}


def build() -> nn.Module:
    """The trained module. Put your own here, and load its weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4)).eval()


def samples() -> Iterable[dict[str, Tensor]]:
    """Real inputs, of different sizes where an axis is free: engines are compared and timed on them."""
    random = torch.Generator().manual_seed(0)
    return [{"input": torch.randn(batch, 16, generator=random)} for batch in (1, 2, 5)]


# What follows may be left out.


def evaluate(predict: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]) -> dict[str, float]:
    """Metrics on held-out data, larger is better (name those that are not in LOWER_IS_BETTER)."""
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(256) % 4  # put your own data here
    return {"accuracy": float((predict({"input": inputs})["output"].argmax(1) == labels).float().mean())}


def train_batches(epoch: int = 0) -> Iterator[dict[str, Tensor]]:
    """Batches for compression steps that train, and for calibration: the inputs, and what loss() needs."""
    random = torch.Generator().manual_seed(2 + epoch)
    for _ in range(10):
        yield {"input": torch.randn(32, 16, generator=random), "label": torch.randint(4, (32,), generator=random)}


def loss(outputs: Mapping[str, Tensor], batch: Mapping[str, Tensor]) -> Tensor:
    """What training makes small."""
    return nn.functional.cross_entropy(outputs["output"], batch["label"])
'''


@click.command("init")
@click.argument("path", type=click.Path(path_type=Path), default=Path("my_model.py"))
@options.overwrite_option
def command(path: Path, overwrite: bool) -> None:
    """Write a model file that works, to be filled with your own model."""
    if path.suffix != ".py":
        raise UsageProblem("DT201", f"a model file must end in .py (got {path})")
    if path.exists() and not overwrite:
        raise UsageProblem("DT203", f"{path} must not exist yet", fix="choose another name, or pass --overwrite")
    write_bytes(path, _MODEL.encode())
    click.echo(f"written: {path}; try: deploytool export {path} --target ort -o out")

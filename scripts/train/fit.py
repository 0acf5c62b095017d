"""The training loop shared by the scripts beside it: seeded, one-cycle AdamW, weights written atomically."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

MODELS = Path(__file__).resolve().parents[2] / "models"
Batch = dict[str, Tensor]


def model_source(name: str) -> ModuleType:
    """The shipped model source `models/NAME.py`, executed."""
    path = MODELS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"models.{name}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} must be a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fit(
    model: nn.Module,
    epochs: int,
    batches: Callable[[int], Iterable[Batch]],
    loss: Callable[[Mapping[str, Tensor], Batch], Tensor],
    peak: float,
) -> None:
    """Train in place for `epochs` passes; the learning rate climbs to `peak` and falls to zero along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05)
    steps = epochs * sum(1 for _ in batches(0))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=peak, total_steps=steps, pct_start=0.15)
    model.train()
    for epoch in range(epochs):
        for batch in batches(epoch):
            inputs = {name: value for name, value in batch.items() if name != "target"}
            value = loss(model(**inputs), batch)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs} loss {value.item():.4f}", file=sys.stderr)
    model.eval()


def write(model: nn.Module, path: Path) -> None:
    """Save the state dict so that a reader sees the old file or the new one, never a part."""
    half_done = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, half_done)
    half_done.chmod(0o644)
    os.replace(half_done, path)


def train(source: ModuleType, new_model: Callable[[], nn.Module], **settings: object) -> None:
    """Train a fresh model with seed 0, write its weights beside the source, print one JSON line of what came out."""
    started = time.perf_counter()
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    model = new_model()
    fit(model, loss=source.loss, **settings)  # type: ignore[arg-type]
    write(model, source.WEIGHTS)
    with torch.inference_mode():
        metrics = source.evaluate(lambda feeds: model(**feeds))
    seconds = round(time.perf_counter() - started, 1)
    print(json.dumps({"model": source.WEIGHTS.stem, **metrics, "seconds": seconds}))

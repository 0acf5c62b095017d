"""TorchScript: the module traced, frozen and optimized for inference.

torch calls TorchScript deprecated; the versions that pyproject.toml allows have it. All of it stays in this file.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning

from deploytool.artifact import Artifact
from deploytool.backends import tables
from deploytool.backends.base import Built, Request, source_of
from deploytool.backends.eager import ModuleRunner, positional
from deploytool.backends.engine import threads_of
from deploytool.errors import BackendFailed, InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.runner import Runner

ENTRY = "model.pt"


@dataclass(frozen=True)
class TorchScript:
    """Builds `model.pt` from a live module."""

    def build(self, request: Request) -> Built:
        """Trace, freeze, save."""
        options = tables.TorchScriptBuild(**request.target.build)
        save_traced(source_of(request).flat, example(request), request.out / ENTRY)
        return Built("torchscript", ENTRY, "fp32", settings={"optimize": options.optimize})

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt`."""
        return open_script(artifact)


def example(request: Request) -> tuple[Tensor, ...]:
    """The calibration feeds with the most free dimensions larger than 1, as tensors.

    Tracing writes sizes of 1 into the graph where it can; of equally good samples the smallest is taken.
    """
    best: tuple[tuple[int, int], tuple[Tensor, ...]] | None = None
    for feeds in request.calibration():
        sizes = request.signature.bind(feeds)
        rank = (sum(size > 1 for size in sizes.values()), -sum(array.size for array in feeds.values()))
        if best is None or rank > best[0]:
            best = (rank, tuple(t.clone() for t in positional(request.signature, feeds)))
    if best is None:
        raise InputRefused("DT303", "tracing must have at least one sample (got none)")
    return best[1]


def save_traced(module: nn.Module, arguments: tuple[Tensor, ...], path: Path) -> None:
    """Trace a module in eval mode, freeze it, and save it to `path`."""
    try:
        with torch_jit(), no_fast_path(), torch.no_grad():
            script = torch.jit.trace(module, arguments, strict=False, check_trace=False)
            torch.jit.save(torch.jit.freeze(script.eval()), str(path))
    except (RuntimeError, TypeError, AttributeError) as error:
        raise InputRefused("DT310", f"the model must be traceable by torch.jit.trace (got: {error})"[:2000],
                           fix="choose a target that lowers to ONNX") from error  # fmt: skip


def open_script(artifact: Artifact) -> Runner:
    """Load a traced module for running on the CPU.

    Optimizing comes after loading: a saved file with the optimizer's own weight layout for convolutions does not load.
    """
    torch.set_num_threads(threads_of(artifact))
    try:
        with torch_jit():
            script = torch.jit.load(str(artifact.main_file), map_location="cpu")
            if artifact.settings.get("optimize"):
                script = torch.jit.optimize_for_inference(script)
    except RuntimeError as error:
        raise BackendFailed("DT504", f"{artifact.main_file} must be TorchScript (got: {error})"[:2000]) from error
    return ModuleRunner(script, artifact.signature)


@contextmanager
def torch_jit() -> Iterator[None]:
    """Silences what torch says of TorchScript's age and of constants in a trace; parity judges the trace."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`?torch\.jit\.", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=TracerWarning)
        yield


BACKEND = TorchScript()

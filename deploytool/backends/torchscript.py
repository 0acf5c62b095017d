"""TorchScript: the module traced or compiled, frozen and optimized for inference; see torchscript_make.py.

torch calls TorchScript deprecated; the versions that pyproject.toml allows have it. All of it stays in files of this
name.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from deploytool.artifact import Artifact
from deploytool.backends import tables
from deploytool.backends.base import Built, Request, source_of
from deploytool.backends.eager import ModuleRunner
from deploytool.backends.engine import threads_of
from deploytool.backends.torchscript_make import quiet_jit, save_script
from deploytool.errors import BackendFailed
from deploytool.runner import Runner

ENTRY = "model.pt"


@dataclass(frozen=True)
class TorchScript:
    """Builds `model.pt` from a live module."""

    def build(self, request: Request) -> Built:
        """Trace or compile, freeze, save."""
        options = tables.TorchScriptBuild(**request.target.build)
        made = save_script(source_of(request).flat, request, options.method, request.out / ENTRY)
        return Built("torchscript", ENTRY, "fp32", settings={"optimize": options.optimize, **made})

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pt`."""
        return open_script(artifact)


def open_script(artifact: Artifact) -> Runner:
    """Load a script for running on the CPU.

    Optimizing comes after loading: a saved file with the optimizer's own weight layout for convolutions does not load.
    """
    torch.set_num_threads(threads_of(artifact))
    try:
        with quiet_jit():
            script = torch.jit.load(str(artifact.main_file), map_location="cpu")
            if artifact.settings.get("optimize"):
                script = torch.jit.optimize_for_inference(script)
    except RuntimeError as error:
        raise BackendFailed("DT504", f"{artifact.main_file} must be TorchScript (got: {error})"[:2000]) from error
    return ModuleRunner(script, artifact.signature)


BACKEND = TorchScript()

"""ExecuTorch with XNNPACK: an exported program lowered to one file, `model.pte`, for phones, boards and this CPU.

What XNNPACK takes is delegated to it, the rest runs in ExecuTorch's own kernels. The runtime plans its memory once, for
the largest sizes that the program was built for: those are in the artifact's settings, and larger feeds are refused.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from executorch.extension.pybindings import _C as NATIVE  # executorch.runtime is this and the whole compiler: 140 MB

from deploytool.artifact import Artifact
from deploytool.backends import tables
from deploytool.backends.base import Built, Request
from deploytool.backends.eager import positional
from deploytool.backends.engine import EngineRunner, threads_of
from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused
from deploytool.runner import Runner
from deploytool.signature import Feeds, Signature

ENTRY = "model.pte"
_METHOD = "forward"
_BACKEND = "XnnpackBackend"


@dataclass(frozen=True)
class ExecuTorch:
    """Builds `model.pte` from a live module."""

    def build(self, request: Request) -> Built:
        """Export with bounded sizes, quantize where the profile says so, lower, write."""
        options = tables.ExecuTorchBuild(**request.target.build)
        # The compiler; opening an artifact does without.
        from deploytool.backends.executorch_lower import lower, sizes_of

        largest = sizes_of(request, options)
        lowered, done = lower(request, options, largest, request.out / ENTRY)
        settings = {"largest": largest, "needs": {"backends": lowered.backends, "operators": lowered.operators}, **done}
        _refuse_missing(settings["needs"], lowered.nodes)
        return Built("executorch", ENTRY, request.target.precision, settings=settings)

    def open(self, artifact: Artifact) -> Runner:
        """Load `model.pte`; raises EnvironmentLacking where the runtime has no kernels for it, BackendFailed."""
        needs = artifact.settings.get("needs", {})
        lacking = missing(needs)
        if lacking:
            raise EnvironmentLacking("DT402", f"the runtime must have {', '.join(lacking)}, which {artifact.entry} "
                                     "needs (it does not)",
                                     fix="install the release of executorch that built it")  # fmt: skip
        NATIVE._unsafe_reset_threadpool(threads_of(artifact))
        return ProgramRunner(artifact.main_file, artifact.signature, artifact.settings.get("largest", {}))


class ProgramRunner(EngineRunner):
    """Runs the one method of a program: positional tensors in the order of the signature."""

    def __init__(self, path: Path, signature: Signature, largest: Mapping[str, int]) -> None:
        super().__init__(signature)
        self.largest = dict(largest)
        try:
            self._program: Any = NATIVE._load_program(str(path))  # the method reads its memory
            self._method: Any = self._program.load_method(_METHOD)
        except RuntimeError as error:
            raise BackendFailed("DT504", f"ExecuTorch must load {path.name} (got: {error})"[:2000]) from error

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """One call; raises InputRefused for sizes beyond those that the program was built for."""
        self._refuse_larger(feeds)
        try:
            outputs = self._method(positional(self.signature, feeds))
        except RuntimeError as error:
            raise BackendFailed("DT504", f"the program must run on feeds that fit its signature (got: {error})"[:2000],
                                detail=[f"{n}: {list(a.shape)}" for n, a in feeds.items()]) from error  # fmt: skip
        return [tensor.numpy() if isinstance(tensor, torch.Tensor) else np.asarray(tensor) for tensor in outputs]

    def _refuse_larger(self, feeds: Feeds) -> None:
        beyond = {dim: size for dim, size in self.signature.bind(feeds).items() if size > self.largest.get(dim, size)}
        if beyond:
            said = ", ".join(f"{dim} {self.largest[dim]}" for dim in beyond)
            got = ", ".join(f"{dim} {size}" for dim, size in beyond.items())
            raise InputRefused("DT308", f"free dimensions must be at most those that the program was built for: {said} "
                                        f"(got {got})",
                               fix="export it with larger ones in [build.largest], or with larger samples")  # fmt: skip

    def close(self) -> None:
        """Free the method before the program."""
        del self._method
        del self._program


def missing(needs: Mapping[str, Sequence[str]]) -> list[str]:
    """What a program needs and the runtime here does not have, by name."""
    if any(name.startswith("quantized_decomposed::") for name in needs.get("operators", ())):
        importlib.import_module("executorch.kernels.quantized")  # which adds its kernels
    known = set(NATIVE._get_operator_names())
    return [*(name for name in needs.get("backends", ()) if not NATIVE._is_available(name)),
            *(name for name in needs.get("operators", ()) if name not in known)]  # fmt: skip


def _refuse_missing(needs: Mapping[str, Sequence[str]], nodes: Mapping[str, Sequence[str]]) -> None:
    lacking = missing(needs)
    if lacking:
        raise InputRefused("DT310", f"the runtime must have kernels for every operator (got none for "
                                    f"{', '.join(lacking)})",
                           detail=[f"{name}: nodes {', '.join(nodes.get(name, ['?'])[:5])}" for name in lacking[:8]],
                           fix="replace these operators in the model, or choose another target")  # fmt: skip


BACKEND = ExecuTorch()

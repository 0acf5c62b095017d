"""The PyTorch module as it is: the reference, and the target `eager`.

The artifact holds where the model came from, not the model: opening it reads the model again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploytool.artifact import Artifact
from deploytool.backends.base import AS_USED, Built, Request, source_of
from deploytool.backends.engine import EngineRunner, threads_of
from deploytool.backends.torch_decoder import TensorCache
from deploytool.decoding import PAST, TOKENS, decodes
from deploytool.errors import BackendFailed, InputRefused
from deploytool.load.flat import FlatModule
from deploytool.load.model import open_source
from deploytool.runner import Runner
from deploytool.signature import Feeds, Signature
from deploytool.source import ModelRef
from deploytool.storage import read_json, write_json

ENTRY = "source.json"


@dataclass(frozen=True)
class Eager:
    """Builds a reference to the source; opens it by loading the source again."""

    def build(self, request: Request) -> Built:
        """Write where the source came from."""
        write_json(request.out / ENTRY, asdict(source_of(request).ref))
        return Built("source", ENTRY, "fp32")

    def open(self, artifact: Artifact) -> Runner:
        """Load the source; raises InputRefused when it no longer has the artifact's signature."""
        source = open_source(ModelRef(**read_json(artifact.main_file)))
        if source.signature != artifact.signature:
            raise InputRefused("DT303", f"{source.ref.path} must still have the signature that was recorded",
                               fix="export the model again")  # fmt: skip
        torch.set_num_threads(threads_of(artifact))
        names = source.signature.input_names, source.signature.output_names
        used = bool(artifact.settings.get(AS_USED))
        return ModuleRunner(FlatModule(source.module, *names, fast_path=used), artifact.signature)


class ModuleRunner(EngineRunner):
    """Runs a module of positional tensors to a tensor or a tuple of tensors."""

    def __init__(self, module: nn.Module, signature: Signature) -> None:
        super().__init__(signature)
        self.module = module

    def decoder(self, capacity: int) -> TensorCache | None:
        """Decodes one sequence of any length; None for modules that are no language model with a cache."""
        takes = {TOKENS, "attention_mask", "position_ids"}
        others = {spec.name for spec in self.signature.inputs if not spec.name.startswith(PAST)}
        return TensorCache(self.module, self.signature) if decodes(self.signature) and others == takes else None

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """Run under inference mode; torch's errors, and the module's own, become BackendFailed."""
        tensors = positional(self.signature, feeds)
        try:
            with torch.inference_mode():
                outputs = self.module(*tensors)
        except Exception as error:  # the module's own code runs here, compiled by torch.jit.script or not
            raise BackendFailed("DT504", f"the module must run on feeds that fit its signature (got: {error})"[:2000],
                                detail=[f"{n}: {list(a.shape)}" for n, a in feeds.items()]) from error  # fmt: skip
        return [tensor.numpy() for tensor in as_tuple(outputs)]


def positional(signature: Signature, feeds: Feeds) -> tuple[Tensor, ...]:
    """The feeds as tensors in the order of the signature; they share memory with the arrays."""
    with warnings.catch_warnings():  # a read-only array is only read here
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return tuple(torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in signature.input_names)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """A module's outputs as a tuple: one tensor stays alone in TorchScript."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


BACKEND = Eager()

"""Runs a TensorRT engine on the GPU, with torch as the owner of GPU memory.

It needs an NVIDIA GPU and a torch with CUDA: its parity is taken where there is one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from deploytool.backends.engine import EngineRunner
from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused
from deploytool.signature import Feeds, Signature

_REBUILD = "build it again on this machine, by the command in the artifact's settings"


def open_engine(trt: Any, log: Any, plan: bytes, signature: Signature) -> CudaRunner:
    """Load a serialized engine for running here.

    Raises EnvironmentLacking without a GPU that torch can use, BackendFailed where TensorRT refuses the engine (it is
    for another GPU or version).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that it cannot use: the answer says as much
        usable = torch.cuda.is_available()
    if not usable:
        raise EnvironmentLacking("DT402", "the engine must run on an NVIDIA GPU that torch can use (got none)",
                                 fix="install a torch with CUDA on a machine with an NVIDIA driver")  # fmt: skip
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendFailed("DT504", "TensorRT must load the engine (it did not)", detail=log.lines[-5:], fix=_REBUILD)
    return CudaRunner(engine, signature, log)


class CudaRunner(EngineRunner):
    """One execution context on a stream of its own; inputs go up and outputs come down with every call."""

    def __init__(self, engine: Any, signature: Signature, log: Any) -> None:
        super().__init__(signature)
        self.engine, self.log = engine, log
        self.context = engine.create_execution_context()
        if self.context is None:
            raise BackendFailed("DT504", "TensorRT must make a context of the engine (it did not)",
                                detail=log.lines[-5:], fix=_REBUILD)  # fmt: skip
        try:
            self.stream = torch.cuda.Stream()
        except RuntimeError as error:
            raise BackendFailed("DT504", f"torch must be able to use the GPU (got: {str(error)[:300]})") from error

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """Copy in, run, copy out; raises InputRefused for sizes outside the engine's profile."""
        with torch.cuda.stream(self.stream):
            inputs = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])).cuda() for name in feeds}
            for name, tensor in inputs.items():
                if not self.context.set_input_shape(name, tuple(tensor.shape)):
                    raise InputRefused("DT308", f"input {name!r} must have a shape within the engine's profile "
                                                f"(got {list(tensor.shape)})")  # fmt: skip
                self.context.set_tensor_address(name, tensor.data_ptr())
            outputs = [self._output(spec.name, spec.dtype) for spec in self.signature.outputs]
            if not self.context.execute_async_v3(self.stream.cuda_stream):
                raise BackendFailed("DT504", "TensorRT must run the engine (it did not)", detail=self.log.lines[-5:])
            # Copying to the host waits for the stream, so the inputs live long enough.
            return [output.cpu().numpy() for output in outputs]

    def _output(self, name: str, dtype: str) -> torch.Tensor:
        tensor = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=getattr(torch, dtype), device="cuda")
        self.context.set_tensor_address(name, tensor.data_ptr())
        return tensor

    def close(self) -> None:
        """Free the context before the engine."""
        del self.context
        del self.engine

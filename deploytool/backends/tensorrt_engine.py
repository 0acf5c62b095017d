"""Runs a TensorRT engine on the GPU, with torch as the owner of GPU memory.

It needs an NVIDIA GPU and a torch with CUDA: its parity is taken where there is one. Nothing here was ever run: its
calls are checked against the published types of TensorRT's bindings.
"""

from __future__ import annotations

import statistics
import warnings
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from deploytool.backends import tensorrt_caches, tensorrt_layers
from deploytool.backends.engine import EngineRunner
from deploytool.errors import BackendFailed, EnvironmentLacking, InputRefused
from deploytool.signature import Feeds, Signature

if TYPE_CHECKING:
    import tensorrt

_REBUILD = "build it again on this machine, by the command in the artifact's settings"
_TIMES_KEPT = 100_000


def open_engine(trt: Any, log: Any, plan: bytes, signature: Signature) -> CudaRunner:
    """Load a serialized engine for running here; `trt` is TensorRT's module, or TensorRT-RTX's.

    Raises EnvironmentLacking without a GPU that torch can use, BackendFailed where TensorRT refuses the engine (it is
    for another GPU or version).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a driver that it cannot use: the answer says as much
        usable = torch.cuda.is_available()
    if not usable:
        raise EnvironmentLacking("DT402", "the engine must run on an NVIDIA GPU that torch can use (got none)",
                                 fix="install a torch with CUDA on a machine with an NVIDIA driver")  # fmt: skip
    runtime: tensorrt.Runtime = trt.Runtime(log)
    engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise BackendFailed("DT504", "TensorRT must load the engine (it did not)", detail=log.lines[-5:], fix=_REBUILD)
    return CudaRunner(trt, runtime, engine, signature, log, tensorrt_caches.kernels(trt, engine, plan))


class CudaRunner(EngineRunner):
    """One execution context on a stream of its own; inputs go up and outputs come down with every call."""

    def __init__(
        self, trt: Any, runtime: tensorrt.Runtime, engine: tensorrt.ICudaEngine, signature: Signature, log: Any,
        kernels: tensorrt_caches.Kernels | None = None,
    ) -> None:  # fmt: skip
        super().__init__(signature)
        self.trt, self.log = trt, log
        self.runtime, self.engine = runtime, engine  # an engine must not outlive its runtime
        self._kernels = kernels
        context: tensorrt.IExecutionContext | None = (
            engine.create_execution_context(kernels.config) if kernels else engine.create_execution_context()
        )
        if context is None:
            raise BackendFailed("DT504", "TensorRT must make a context of the engine (it did not)",
                                detail=log.lines[-5:], fix=_REBUILD)  # fmt: skip
        self.context = context
        self._spans: deque[float] = deque(maxlen=_TIMES_KEPT)
        try:
            self.stream = torch.cuda.Stream()
            self._events = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            self._nothing = torch.empty(1, device="cuda")
        except RuntimeError as error:
            raise BackendFailed("DT504", f"torch must be able to use the GPU (got: {str(error)[:300]})") from error

    def infer(self, feeds: Feeds) -> Sequence[np.ndarray]:
        """Copy in, run, copy out; raises InputRefused for sizes outside the engine's profile."""
        try:
            with torch.cuda.stream(self.stream):
                return self._infer(feeds)
        except RuntimeError as error:  # torch's own class for memory that is not there, and for lost devices
            raise BackendFailed("DT504", f"torch must be able to use the GPU (got: {str(error)[:300]})") from error

    def layers(self) -> dict[str, Any]:
        """What the engine's own inspector tells; see tensorrt_layers.summary."""
        inspector: tensorrt.EngineInspector | None = self.engine.create_engine_inspector()
        if inspector is None:
            return {"not_available": "TensorRT gave no inspector of the engine"}
        inspector.execution_context = self.context
        json: tensorrt.LayerInformationFormat = self.trt.LayerInformationFormat.JSON
        return tensorrt_layers.summary(inspector.get_engine_information(json))

    def device_ms(self) -> float | None:
        """Median milliseconds that the GPU took for a run since this was last asked, copies and host left out."""
        found = statistics.median(self._spans) if self._spans else None
        self._spans.clear()
        return found

    def _infer(self, feeds: Feeds) -> list[np.ndarray]:
        inputs = {name: self._up(name, np.ascontiguousarray(feeds[name])) for name in feeds}
        for name, tensor in inputs.items():
            if not self.context.set_input_shape(name, tuple(feeds[name].shape)):
                raise InputRefused("DT308", f"input {name!r} must have a shape within the engine's profile "
                                            f"(got {list(feeds[name].shape)})")  # fmt: skip
            self._place(name, tensor)
        outputs = [self._output(spec.name, spec.dtype) for spec in self.signature.outputs]
        start, end = self._events
        start.record(self.stream)
        ran = self.context.execute_async_v3(self.stream.cuda_stream)
        end.record(self.stream)
        if not ran:
            raise BackendFailed("DT504", "TensorRT must run the engine (it did not)", detail=self.log.lines[-5:])
        end.synchronize()  # outputs on the host, which hold shapes, are written by then too
        self._spans.append(start.elapsed_time(end))
        return [output.cpu().numpy() for output in outputs]

    def _on_host(self, name: str) -> bool:
        """Whether TensorRT reads or writes a tensor in the host's memory: it does with what only holds sizes."""
        return bool(self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST)

    def _up(self, name: str, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self._on_host(name) else tensor.cuda()

    def _place(self, name: str, tensor: torch.Tensor) -> None:
        """Tell TensorRT where a tensor lies; one without elements has no memory, and no address would be an error."""
        if not tensor.numel():
            tensor = self._nothing
        if not self.context.set_tensor_address(name, tensor.data_ptr()):
            raise BackendFailed("DT504", f"TensorRT must take the memory of {name!r} (it did not)",
                                detail=self.log.lines[-5:])  # fmt: skip

    def _output(self, name: str, dtype: str) -> torch.Tensor:
        dims: Any = self.context.get_tensor_shape(name)  # iterable, which its types do not say
        shape = tuple(dims)
        if any(size < 0 for size in shape):
            raise BackendFailed("DT504", f"the shape of output {name!r} must follow from the inputs' shapes (it "
                                "depends on their values)")  # fmt: skip
        device = "cpu" if self._on_host(name) else "cuda"
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        self._place(name, tensor)
        return tensor

    def close(self) -> None:
        """Free the context before the engine, and that before its runtime; what was compiled is kept."""
        if self._kernels:
            self._kernels.keep()
        del self._kernels
        del self.context
        del self.engine
        del self.runtime

"""The runner of TensorRT engines with a GPU stood in for, and the reading of what an inspector tells."""

from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from deploytool.backends import tensorrt_layers  # noqa: E402
from deploytool.backends.tensorrt_engine import CudaRunner  # noqa: E402
from deploytool.errors import BackendFailed, InputRefused  # noqa: E402
from deploytool.signature import Signature, TensorSpec  # noqa: E402

SIGNATURE = Signature(
    (TensorSpec("x", "float32", ("batch", 3)), TensorSpec("past", "float32", ("length", 2))),
    (TensorSpec("y", "float32", ("batch", 3)),),
)
TYPES = SimpleNamespace(
    TensorLocation=SimpleNamespace(HOST="host", DEVICE="device"), LayerInformationFormat=SimpleNamespace(JSON="json")
)
LAYERS = [
    {"Name": "conv + relu", "Inputs": [{"Name": "a", "Format/Datatype": "Thirty-two wide vectorized Int8 format"}],
     "Outputs": [{"Format/Datatype": "Half"}]},
    {"Name": "gemm", "Inputs": [{"Format/Datatype": "Row major linear FP16 format"}], "Metadata": "[MatMul]\x1f[Add]"},
    {"Name": "norm", "Inputs": [{"Datatype": "BFloat16"}], "Metadata": "[LayerNormalization]"},
    {"Name": "product", "Inputs": [{"Format/Datatype": "FP8 E4M3"}]},
    {"Name": "shape", "Inputs": [], "Outputs": [{"Format/Datatype": "Int64"}]},
    {"Name": "plain", "Inputs": [{"Format/Datatype": "Float"}]},
    {"Name": "told nothing"},
]  # fmt: skip


class Context:
    """Copies x to y; remembers what it was given."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.places: dict[str, int] = {}
        self.output: tuple[int, ...] | None = None
        self.runs = True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] <= 8

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.places[name] = memory
        return memory != 0

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.output or self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        return self.runs


class Event:
    """Each run takes as many milliseconds as there were runs."""

    count = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object) -> None:
        Event.count += 1

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: object) -> float:
        return Event.count / 2


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> CudaRunner:
    """A runner of the stand-in; the CPU's memory stands in for the GPU's."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device="cpu", **rest: empty(*shape, **rest))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    Event.count = 0
    inspector = SimpleNamespace(get_engine_information=lambda kind: json.dumps({"Layers": LAYERS, "Bindings": []}))
    engine: Any = SimpleNamespace(create_execution_context=Context, create_engine_inspector=lambda: inspector,
                                  get_tensor_location=lambda name: "device")  # fmt: skip
    return CudaRunner(TYPES, SimpleNamespace(), engine, SIGNATURE, SimpleNamespace(lines=["its log"]))  # type: ignore[arg-type]


def feeds(batch: int = 2, length: int = 0) -> dict[str, np.ndarray]:
    return {"x": np.ones((batch, 3), np.float32), "past": np.ones((length, 2), np.float32)}


def test_a_run_gives_shapes_and_addresses(runner: CudaRunner) -> None:
    """Every input must have its shape and an address, an empty cache too, and outputs the shape that follows."""
    assert runner.run(feeds())["y"].shape == (2, 3)
    context: Any = runner.context
    assert context.shapes == {"x": (2, 3), "past": (0, 2)} and set(context.places) == {"x", "past", "y"}
    runner.close()
    assert not hasattr(runner, "engine")


def test_the_gpus_time_is_told_apart(runner: CudaRunner) -> None:
    """Milliseconds by the GPU's own events must be the median since they were last asked for, None without a run."""
    assert runner.device_ms() is None
    for _ in range(3):
        runner.run(feeds())
    assert runner.device_ms() == 2.0
    assert runner.device_ms() is None


def test_what_the_engine_refuses_is_an_error(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes outside the profile, outputs of unknown size, a failed run and torch's own errors must each be told."""
    with pytest.raises(InputRefused, match="within the engine's profile"):
        runner.run(feeds(batch=9))
    context: Any = runner.context
    context.output = (-1, 3)
    with pytest.raises(BackendFailed, match="must follow from the inputs' shapes"):
        runner.run(feeds())
    context.output, context.runs = None, False
    with pytest.raises(BackendFailed, match="must run the engine") as caught:
        runner.run(feeds())
    assert caught.value.detail == ("its log",)

    def full(tensor: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch.Tensor, "cuda", full)
    with pytest.raises(BackendFailed, match="able to use the GPU"):
        runner.run(feeds())


def test_sizes_lie_in_the_hosts_memory(runner: CudaRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TensorRT reads on the host must not be copied to the GPU."""
    engine: Any = runner.engine
    engine.get_tensor_location = lambda name: "host" if name == "past" else "device"
    copied: list[int] = []
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: (copied.append(tensor.shape[1]), tensor)[1])
    runner.run(feeds(length=1))
    assert copied == [3]


def test_layers_are_counted_by_what_they_read(runner: CudaRunner) -> None:
    """Layers must count by the type that they read first, fused ones by metadata or joined names, the rest unknown."""
    told = runner.layers()
    assert told["layers"] == 7 and told["fused"] == 2
    assert told["by_precision"] == {"bf16": 1, "fp16": 1, "fp32": 1, "fp8": 1, "int8": 1, "other": 1, "unknown": 1}
    assert tensorrt_layers.sentence(told).startswith("7 layers (1 in bf16, 1 in fp16")


@pytest.mark.parametrize(("answer", "said"), [
    ("", "no layers"), ("[1]", "no layers"), ('{"Bindings": []}', "no layers"), ('{"Layers": []}', "named no layer"),
])  # fmt: skip
def test_an_answer_without_layers_is_said(answer: str, said: str) -> None:
    """An inspector that tells nothing must be said to tell nothing."""
    told = tensorrt_layers.summary(answer)
    assert said in told["not_available"] and tensorrt_layers.sentence(told) == told["not_available"]


def test_names_alone_are_of_unknown_precision() -> None:
    """An engine that was built without its details must not be given precisions."""
    told = tensorrt_layers.summary(json.dumps({"Layers": ["conv + relu", "gemm"]}))
    assert told == {"layers": 2, "by_precision": {"unknown": 2}, "fused": 1}


def test_a_context_is_made_with_the_kernels_that_were_kept(runner: CudaRunner) -> None:
    """The runtime cache must be in what the context is made of, and be kept when the engine is closed."""
    told: list[Any] = []
    kernels: Any = SimpleNamespace(config="its config", keep=lambda: told.append("kept"))

    def make(config: object = None) -> Context:
        told.append(config)
        return Context()

    engine: Any = SimpleNamespace(create_execution_context=make, get_tensor_location=lambda name: "device")
    with CudaRunner(TYPES, SimpleNamespace(), engine, SIGNATURE, SimpleNamespace(lines=[]), kernels) as opened:  # type: ignore[arg-type]
        opened.run(feeds())
        assert told == ["its config"]
    assert told == ["its config", "kept"]

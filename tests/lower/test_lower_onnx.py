"""What lower_onnx writes, how it chooses, and what it refuses."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from deploytool.artifact import Artifact
from deploytool.backends.tables import OnnxRuntimeBuild
from deploytool.errors import InputRefused
from deploytool.lower import onnx_write
from deploytool.lower.onnx import SESSION, choose_example, lower_onnx
from deploytool.signature import Signature, TensorSpec
from deploytool.target import load_target

IMAGE = {"x": ("batch", 8)}
SCORES = {"y": ("batch", 4)}


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))


def samples(*sizes: int) -> list[tuple[Tensor]]:
    return [(torch.randn(size, 8),) for size in sizes]


def test_same_model_gives_the_same_bytes(make_source: Any, tmp_path: Path) -> None:
    """Two lowerings of one model are equal to the byte."""
    source = make_source(net(), IMAGE, SCORES, samples(2))
    digests = [hashlib.sha256(lower_onnx(source, tmp_path / name).main_file.read_bytes()).hexdigest() for name in "ab"]
    assert digests[0] == digests[1]


def test_the_graph_is_checked_as_its_plain_target_runs_it() -> None:
    """The settings of the check are those of the profile `ort`: what is known of the one then holds for the other."""
    target = load_target("ort")
    options = OnnxRuntimeBuild(**target.build).model_dump(mode="json")
    told = {key: options[key] for key in ("optimization", "without", "arena", "flush")}
    assert {**target.runtime.model_dump(mode="json"), **told} == SESSION


def test_artifact_says_how_it_came(make_source: Any, check: Any) -> None:
    """The manifest names exporter, reason, opset and versions, and the graph passes ONNX's own checker."""
    artifact = check(make_source(net(), IMAGE, SCORES, samples(2, 1, 3)))
    assert Artifact.load(artifact.folder).history == artifact.history
    step = artifact.history[-1]
    assert (step.settings["exporter"], step.settings["opset"]) == ("torchscript", 18)
    assert step.versions["torch"]
    onnx.checker.check_model(artifact.main_file, full_check=True)


def test_large_weights_go_to_one_aligned_file(
    make_source: Any, check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """Past the limit, weights stand page-aligned in model.onnx.data, named without a folder."""
    monkeypatch.setattr(onnx_write, "EMBED_LIMIT_BYTES", 1000)
    artifact = check(make_source(net(512), IMAGE, SCORES, samples(2, 5)))
    assert [entry.path for entry in artifact.files] == ["model.onnx", "model.onnx.data"]
    external = [tensor for tensor in onnx.load(artifact.main_file, load_external_data=False).graph.initializer
                if tensor.data_location == onnx.TensorProto.EXTERNAL]  # fmt: skip
    assert external
    for tensor in external:
        fields = {entry.key: entry.value for entry in tensor.external_data}
        assert fields["location"] == "model.onnx.data"
        assert int(fields.get("offset", 0)) % 4096 == 0 or int(fields["length"]) <= 4096


def test_embedded_weights_are_the_modules_own(make_source: Any, tmp_path: Path) -> None:
    """What is streamed into the file reads back as the module's numbers, of every type and past one length byte."""

    class Typed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("low", torch.randn(700, 3, dtype=torch.float16))
            self.register_buffer("whole", torch.arange(1900))
            self.register_buffer("flags", torch.rand(3000) > 0.5)
            self.weight = nn.Parameter(torch.randn(20000))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return x + self.weight[:8], self.low * 2, self.whole + 1, ~self.flags, self.weight * x[0, 0]

    source = make_source(Typed(), IMAGE, {"a": ("batch", 8), "b": (700, 3), "c": (1900,), "d": (3000,), "e": (20000,)},
                         samples(2))  # fmt: skip
    graph = onnx.load(lower_onnx(source, tmp_path / "onnx").main_file).graph
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for name, tensor in (*source.module.named_parameters(), *source.module.named_buffers()):
        np.testing.assert_array_equal(found[name], tensor.detach().numpy())


def test_broken_weights_are_refused_by_name(make_source: Any, tmp_path: Path) -> None:
    """NaN and infinity in weights and NaN in buffers stop the lowering; an infinite mask does not."""
    source = make_source(net(), IMAGE, SCORES, samples(2))
    source.module.register_buffer("mask", torch.full((2,), -torch.inf))
    lower_onnx(source, tmp_path / "masked")
    with torch.no_grad():
        source.module[2].weight[1, 1] = torch.inf
    source.module.register_buffer("mean", torch.tensor([1.0, torch.nan]))
    with pytest.raises(InputRefused) as caught:
        lower_onnx(source, tmp_path / "bad")
    assert caught.value.code == "DT304"
    assert caught.value.detail == ("2.weight", "mean")


class Untraceable(nn.Module):
    """Something that only torch.export takes."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("first line\nnot under a trace")
        return x * 2.0


def test_auto_turns_to_dynamo_and_says_why(make_source: Any, check: Any) -> None:
    """Where tracing fails, "auto" exports by dynamo, right at other sizes, and the history keeps the reason."""
    source = make_source(Untraceable(), IMAGE, {"y": ("batch", 8)}, samples(2, 1, 5))
    settings = check(source).history[-1].settings
    assert settings["exporter"] == "dynamo"
    assert "not under a trace" in settings["why"]


def test_dynamo_on_request_keeps_the_signature(make_source: Any, check: Any) -> None:
    """Dynamo's graph has the same names, types and free dimensions as the traced one."""
    artifact = check(make_source(net(), IMAGE, SCORES, samples(2, 1, 5)), exporter="dynamo")
    graph = onnx.load(artifact.main_file).graph
    assert [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.input, *graph.output)] \
        == [["batch", 8], ["batch", 4]]  # fmt: skip
    assert artifact.history[-1].settings["exporter"] == "dynamo"


def test_a_frozen_dimension_is_refused(make_source: Any, tmp_path: Path) -> None:
    """A trace that turned a free dimension into a number is no success."""

    class Frozen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.zeros(x.tolist().__len__(), 8) + 1.0

    source = make_source(Frozen(), IMAGE, {"y": ("batch", 8)}, samples(3))
    with pytest.raises(InputRefused) as caught:
        lower_onnx(source, tmp_path / "onnx", exporter="torchscript")
    assert caught.value.code == "DT305"
    assert "'batch'" in caught.value.detail[0]


def test_a_module_that_no_exporter_takes_is_refused_with_both_reasons(make_source: Any, tmp_path: Path) -> None:
    """DT305 names both exporters and the last line of what torch said; the module keeps its parameters."""

    class Hopeless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            if x.sum() > 0 and (torch.jit.is_tracing() or torch.compiler.is_exporting()):
                raise RuntimeError("cannot be written down")
            return x * self.weight

    source = make_source(Hopeless(), IMAGE, {"y": ("batch", 8)}, [(torch.ones(2, 8),)])
    with pytest.raises(InputRefused) as caught:
        lower_onnx(source, tmp_path / "onnx")
    assert caught.value.code == "DT305"
    assert [line.split(":")[0] for line in caught.value.detail] == ["torchscript", "dynamo"]
    assert "cannot be written down" in caught.value.detail[0]
    assert isinstance(source.module.weight, nn.Parameter)
    assert list(source.module.state_dict()) == ["weight"]


def test_example_is_the_sample_that_tells_most() -> None:
    """Sizes above 1 and different ones come first, then the smaller sample; a lone batch of 1 is doubled."""
    signature = Signature((TensorSpec("x", "float32", ("b", "s")), TensorSpec("n", "float32", ("b",))), ())

    def chosen(*sizes: tuple[int, int]) -> tuple[int, ...]:
        feeds = [{"x": torch.zeros(b, s), "n": torch.zeros(b)} for b, s in sizes]
        return tuple(choose_example(signature, feeds)[0].shape)

    assert chosen((1, 5), (3, 3), (2, 4), (2, 9)) == (2, 4)
    assert chosen((3, 3), (4, 1)) == (3, 3)
    assert chosen((1, 7)) == (2, 7)


def test_no_sample_is_refused(make_source: Any) -> None:
    """Without an example there is nothing to trace."""
    with pytest.raises(InputRefused, match="at least one sample"):
        choose_example(Signature((), ()), [])

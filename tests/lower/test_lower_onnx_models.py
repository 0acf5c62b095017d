"""Every kind of module gives eager's numbers at sizes that the exporter never saw."""

from __future__ import annotations

from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention


class Attention(nn.Module):
    """One attention layer with a boolean mask, heads grouped or not, as language and vision models have it."""

    def __init__(self, groups: int = 4, causal: bool = False) -> None:
        super().__init__()
        self.groups = groups
        self.causal = causal
        self.q = nn.Linear(32, 32)
        self.kv = nn.Linear(32, 2 * groups * 8)
        self.norm = nn.LayerNorm(32)
        self.out = nn.Linear(32, 32)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, self.groups, 8)).permute(2, 0, 3, 1, 4)
        allowed = None if self.causal else mask[:, None, None, :]
        mixed = scaled_dot_product_attention(q, k, v, allowed, is_causal=self.causal, enable_gqa=self.groups < 4)
        return gelu(self.norm(x + self.out(mixed.transpose(1, 2).flatten(2))))


def attention_samples() -> list[tuple[Tensor, Tensor]]:
    samples = []
    for batch, length in ((2, 5), (1, 3), (4, 9)):
        mask = torch.rand(batch, length) > 0.3
        mask[:, 0] = True
        samples.append((torch.randn(batch, length, 32), mask))
    samples[0][1][1] = False  # a text of padding only: torch gives zeros where softmax gives NaN
    return samples


@pytest.mark.parametrize(("groups", "causal"), [(4, False), (2, False), (4, True), (1, True)])
def test_attention_of_every_kind(make_source: Any, check: Any, groups: int, causal: bool) -> None:
    """Masked, causal and grouped attention agree with eager, also for a text that is nothing but padding."""
    torch.manual_seed(0)
    source = make_source(Attention(groups, causal), {"x": ("batch", "length", 32), "mask": ("batch", "length")},
                         {"y": ("batch", "length", 32)}, attention_samples())  # fmt: skip
    ops = [node.op_type for node in onnx.load(check(source).main_file).graph.node]
    assert "IsNaN" not in ops
    assert ops.count("LayerNormalization") == 1


class Recurrent(nn.Module):
    """A batch-first LSTM that starts from zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, num_layers=2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out, (hidden, _) = self.lstm(x)
        return out, hidden.transpose(0, 1)


def test_lstm_with_free_batch_and_length(make_source: Any, check: Any) -> None:
    """An LSTM runs at other batches and lengths, and its weights are constants of the graph."""
    torch.manual_seed(0)
    samples = [(torch.randn(b, s, 4),) for b, s in ((2, 3), (1, 7), (5, 1))]
    source = make_source(Recurrent(), {"x": ("batch", "steps", 4)},
                         {"out": ("batch", "steps", 12), "hidden": ("batch", 4, 6)}, samples)  # fmt: skip
    graph = onnx.load(check(source).main_file).graph
    constants = {tensor.name for tensor in graph.initializer}
    layers = [node for node in graph.node if node.op_type == "LSTM"]
    assert len(layers) == 2
    assert all({node.input[1], node.input[2], node.input[3]} <= constants for node in layers)


def test_batch_norms_become_part_of_their_convolution(make_source: Any, check: Any) -> None:
    """Conv, batch norm and ReLU leave no batch norm, and the numbers stay."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, groups=2),
                        nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
                        nn.BatchNorm1d(3))  # fmt: skip
    for module in net.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    samples = [(torch.randn(b, 3, 12, 12),) for b in (2, 1, 5)]
    source = make_source(net, {"image": ("batch", 3, 12, 12)}, {"scores": ("batch", 3)}, samples)
    ops = [node.op_type for node in onnx.load(check(source).main_file).graph.node]
    assert "BatchNormalization" not in ops


class Odd(nn.Module):
    """Integers, booleans, a number of rank 0, an input that nothing reads, one that is passed through, one result
    twice, a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 3)
        self.register_buffer("steps", torch.arange(3))

    def forward(self, ids: Tensor, keep: Tensor, factor: Tensor, unused: Tensor) -> tuple[Tensor, ...]:
        picked = self.table(ids) * factor * keep.unsqueeze(-1)
        return picked, ids, picked, keep.logical_not(), ids.sum(dim=1), self.steps * 2


def test_odd_inputs_and_outputs(make_source: Any, check: Any) -> None:
    """Names, order and types stay as in the signature, for inputs that nothing reads and results given twice too."""
    samples = [
        (torch.randint(0, 11, (b, s)), torch.rand(b, s) > 0.5, torch.tensor(1.5), torch.zeros(b, dtype=torch.int32))
        for b, s in ((2, 3), (1, 4), (3, 1))
    ]
    inputs = {"ids": ("b", "s"), "keep": ("b", "s"), "factor": (), "unused": ("b",)}
    outputs = {"picked": ("b", "s", 3), "ids_again": ("b", "s"), "picked_again": ("b", "s", 3), "dropped": ("b", "s"),
               "total": ("b",), "steps": (3,)}  # fmt: skip
    source = make_source(Odd(), inputs, outputs, samples)
    graph = onnx.load(check(source).main_file).graph
    assert [value.name for value in graph.input] == list(inputs)
    assert [value.name for value in graph.output] == list(outputs)
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output]
    assert dims == [list(shape) for shape in outputs.values()]


class Tied(nn.Module):
    """A language model's embedding that is also its head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(500, 16)
        self.middle = nn.Linear(16, 64)
        self.back = nn.Linear(64, 16)
        self.head = nn.Linear(16, 500, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.back(torch.relu(self.middle(self.embedding(ids)))))


def test_tied_weights_are_stored_once_and_linear_weights_are_constants(make_source: Any, check: Any) -> None:
    """The file holds one copy of a tied weight; every other linear layer multiplies by a constant, not a Transpose."""
    samples = [(torch.randint(0, 500, (b, s)),) for b, s in ((2, 3), (1, 5))]
    source = make_source(Tied(), {"ids": ("b", "s")}, {"logits": ("b", "s", 500)}, samples)
    artifact = check(source)
    graph = onnx.load(artifact.main_file).graph
    floats = sum(4 * torch.Size(t.dims).numel() for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT)
    assert floats == sum(4 * p.numel() for p in source.module.parameters())
    names = {tensor.name for tensor in graph.initializer}
    assert {"embedding.weight", "middle.weight.T", "back.weight.T", "middle.bias"} <= names
    assert [node.op_type for node in graph.node].count("Transpose") == 1
    assert source.module.head.weight is source.module.embedding.weight
    assert isinstance(source.module.head.weight, nn.Parameter)


class Cached(nn.Module):
    """One layer of a language model with a cache: grouped keys, past in, present out."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, 16)
        self.kv = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        new_key, new_value = self.kv(x).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        key, value = torch.cat([key, new_key], dim=2), torch.cat([value, new_value], dim=2)
        steps = torch.arange(key.shape[2])
        seen = steps[None, :] <= steps[-x.shape[1] :, None]
        allowed = seen[None, None] & mask[:, None, None, :].bool()
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        mixed = scaled_dot_product_attention(q, key, value, allowed, enable_gqa=True)
        return mixed.transpose(1, 2).flatten(2), key, value


def test_cache_of_a_language_model(make_source: Any, check: Any) -> None:
    """A graph with a cache runs with an empty past, one token and a long past; dotted names are kept."""
    torch.manual_seed(0)
    samples = []
    for batch, past, new in ((2, 3, 4), (1, 0, 6), (3, 7, 1)):
        mask = torch.ones(batch, past + new, dtype=torch.int64)
        mask[-1, 0] = 0
        cache = [torch.randn(batch, 2, past, 4) for _ in range(2)]
        samples.append((torch.randn(batch, new, 16), mask, *cache))
    pair = [f"past_key_values.0.{kind}" for kind in ("key", "value")]
    source = make_source(
        Cached(), {"x": ("b", "s", 16), "attention_mask": ("b", "t"), **dict.fromkeys(pair, ("b", 2, "past", 4))},
        {"logits": ("b", "s", 16), "present.0.key": ("b", 2, "t", 4), "present.0.value": ("b", 2, "t", 4)}, samples,
    )  # fmt: skip
    check(source)

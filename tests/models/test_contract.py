"""What every shipped model source promises, whatever the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import open_source
from torch import nn

TRAINED_HERE = ("digits", "charlstm", "mnistcnn")

Open = Callable[[str], Any]


@pytest.fixture(params=["digits", "minilm", "smollm2", "charlstm", "mnistcnn"])
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_samples_are_the_same_every_time(name: str, source: Callable[[str], ModuleType]) -> None:
    """Asking for the samples twice, and walking one answer twice, must give equal tensors."""
    given = source(name).samples()
    walks = [list(given), list(given), list(source(name).samples())]
    for first, *others in zip(*walks, strict=True):
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[key], other[key]) for key in first)


def test_samples_can_be_trained_on_wherever_they_were_made(name: str, source: Callable[[str], ModuleType]) -> None:
    """Samples and batches first asked for in inference mode must not be inference tensors, which training refuses."""
    fresh = source(name) if name == "smollm2" else open_source.__wrapped__(name)  # reading it again takes long
    with torch.inference_mode():
        list(fresh.samples())
        if name in TRAINED_HERE:
            list(fresh.train_batches())
    made = [*fresh.samples(), *(fresh.train_batches() if name in TRAINED_HERE else ())]
    assert not any(tensor.is_inference() for feeds in made for tensor in feeds.values())


def test_samples_cover_the_free_dimensions(name: str, source: Callable[[str], ModuleType]) -> None:
    """There must be at least 4 distinct shapes, every dimension that INPUTS leaves free must vary, and no other."""
    source_ = source(name)
    samples = list(source_.samples())
    assert 6 <= len(samples) <= 16
    assert len({tuple(tuple(t.shape) for t in sample.values()) for sample in samples}) >= 4
    seen: dict[str, set[int]] = {}
    for sample in samples:
        assert set(sample) == set(source_.INPUTS)
        for key, tensor in sample.items():
            assert tensor.dim() == len(source_.INPUTS[key])
            for declared, size in zip(source_.INPUTS[key], tensor.shape, strict=True):
                if isinstance(declared, str):
                    seen.setdefault(declared, set()).add(size)
                else:
                    assert size == declared
    assert all(len(sizes) > 1 for sizes in seen.values()), seen


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_of_the_first_sample_is_right_at_every_other(
    name: str, source: Callable[[str], ModuleType], model: Callable[[str], nn.Module], positional: Open
) -> None:
    """A module traced at the timing sample's shape must agree with the eager module on all samples."""
    samples = list(source(name).samples())
    names = list(samples[0])
    adapter = positional(model(name), names).eval()
    with torch.inference_mode():
        traced = torch.jit.trace(adapter, tuple(samples[0].values()), check_trace=False)
        for sample in samples:
            feeds = tuple(sample[key] for key in names)
            for got, expected in zip(traced(*feeds), adapter(*feeds), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_module_is_in_eval_mode_and_deterministic(
    name: str, source: Callable[[str], ModuleType], model: Callable[[str], nn.Module]
) -> None:
    """No submodule may be in training mode, and the same feeds must give the same numbers."""
    module = model(name)
    assert not any(part.training for part in module.modules())
    feeds = next(iter(source(name).samples()))
    with torch.inference_mode():
        first, second = module(**feeds), module(**feeds)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_files_it_depends_on_exist(name: str, source: Callable[[str], ModuleType]) -> None:
    """Every path in FILES must exist: the cache key is made from them."""
    assert source(name).FILES and all(Path(path).exists() for path in source(name).FILES)


@pytest.mark.parametrize("trained", TRAINED_HERE)
def test_one_step_of_training_lowers_the_loss(trained: str, source: Callable[[str], ModuleType]) -> None:
    """A gradient step on a batch must lower the loss on that batch, and an epoch must be finite and seeded."""
    source_ = source(trained)
    first, again = (next(iter(source_.train_batches())) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert 1 < sum(1 for _ in source_.train_batches()) < 1000

    module = source_.build().train()
    inputs = {key: value for key, value in first.items() if key != "target"}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    before = source_.loss(module(**inputs), first)
    before.backward()
    optimizer.step()
    assert source_.loss(module(**inputs), first) < before


@pytest.mark.parametrize("trained", TRAINED_HERE)
def test_the_weights_are_small_and_single_precision(trained: str, source: Callable[[str], ModuleType]) -> None:
    """Weights kept in the repository must stay below 1 MB and be fp32."""
    path = source(trained).WEIGHTS
    assert path.stat().st_size < 1_000_000
    assert {tensor.dtype for tensor in source(trained).build().state_dict().values()} <= {torch.float32, torch.int64}

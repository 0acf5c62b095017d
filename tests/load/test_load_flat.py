"""Tensors in, tensors out: names for nested outputs, and values of samples as tensors."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused
from deploytool.load.flat import FlatModule, as_tensor, named_outputs

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass
class Result:
    scores: Any
    boxes: Any = None


def _model_output() -> Any:
    outputs = pytest.importorskip("transformers").modeling_outputs
    return outputs.BaseModelOutput(last_hidden_state=A, hidden_states=(B, C))


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (lambda: A, ["output"]),
        (lambda: (A, B), ["output_0", "output_1"]),
        (lambda: [A, None, B], ["output_0", "output_2"]),
        (lambda: {"a": A, "none": None, "b": B}, ["a", "b"]),
        (lambda: {"a": (A, {"deep": B}), "c": C}, ["a.0", "a.1.deep", "c"]),
        (lambda: ((A, B), C), ["output_0.0", "output_0.1", "output_1"]),
        (lambda: Pair(A, Pair(B, None)), ["left", "right.left"]),
        (lambda: Result(A, {"x": B}), ["scores", "boxes.x"]),
        (lambda: Result(A), ["scores"]),
        (_model_output, ["last_hidden_state", "hidden_states.0", "hidden_states.1"]),
        (lambda: {0: A, 1: B}, ["0", "1"]),
        (lambda: None, []),
    ],
)
def test_outputs_get_names(value: Any, names: list[str]) -> None:
    """Every tensor of a nested output must get its own name, in order; None must be left out."""
    assert list(named_outputs(value())) == names


@pytest.mark.parametrize(
    "value", [{"a": A, "b": "text"}, (A, 3), object(), {"a": {"b": A}, "a.b": B}, {1: A, "1": B}]
)
def test_other_outputs_are_refused(value: Any) -> None:
    """What is no tensor, and two tensors under one name, must be refused and not dropped."""
    with pytest.raises(InputRefused) as caught:
        named_outputs(value)
    assert caught.value.code == "DT302"


@pytest.mark.parametrize(
    ("value", "dtype", "shape"),
    [
        (True, torch.bool, ()), (3, torch.int64, ()), (0.5, torch.float32, ()),
        (np.float32(2), torch.float32, ()), (np.arange(3)[::-1], torch.int64, (3,)),
        ([[1.0, 2.0]], torch.float32, (1, 2)), (torch.ones(2, dtype=torch.int8), torch.int8, (2,)),
        (nn.Parameter(torch.ones(2)), torch.float32, (2,)),
    ],
)  # fmt: skip
def test_sample_values_become_tensors(value: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Numbers must become tensors of rank 0, arrays and lists tensors, and none may ask for gradients."""
    tensor = as_tensor("x", value)
    assert (tensor.dtype, tuple(tensor.shape), tensor.requires_grad) == (dtype, shape, False)


def test_a_read_only_array_is_copied() -> None:
    """A sample may be an array that must not be written to."""
    array = np.arange(3.0)
    array.flags.writeable = False
    tensor = as_tensor("x", array)
    tensor += 1
    assert array.tolist() == [0, 1, 2]


@pytest.mark.parametrize("value", ["text", None, object(), {"a": 1}, [[1], [2, 3]], np.array(["a"])])
def test_other_sample_values_are_refused(value: Any) -> None:
    """What is no number must be refused by the input's name."""
    with pytest.raises(InputRefused, match="'x'") as caught:
        as_tensor("x", value)
    assert caught.value.code == "DT303"


def test_the_flat_module_keeps_order_mode_and_ties() -> None:
    """Positional inputs go by name, outputs come in the signature's order, and the mode is the module's own."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(2, 2, bias=False)
            self.second = nn.Linear(2, 2, bias=False)
            self.second.weight = self.first.weight

        def forward(self, a: Tensor, b: Tensor) -> dict[str, Tensor]:
            return {"sum": a + b, "difference": a - b, "tied": self.second(a)}

    inner = Inner().eval()
    flat = FlatModule(inner, ("b", "a"), ("difference", "sum"))
    ones, twos = torch.ones(1, 2), torch.full((1, 2), 2.0)
    difference, total = flat(ones, twos)
    assert (difference.tolist(), total.tolist()) == ([[1, 1]], [[3, 3]])
    assert not flat.training and len(list(flat.parameters())) == 1

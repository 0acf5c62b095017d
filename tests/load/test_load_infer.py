"""The signature of a module from its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused
from deploytool.load.infer import infer_signature
from deploytool.signature import Signature, TensorSpec


class Calls(nn.Module):
    """Calls a function of x and y."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        return self.function(x) if y is None else self.function(x, y)


def signature(
    function: Callable[..., Any], samples: list[dict[str, Tensor]], declared: dict[str, Any] | None = None
) -> Signature:
    return infer_signature(Calls(function), samples, declared)


def shapes(specs: tuple[TensorSpec, ...]) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in specs}


def x(*sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    return [{"x": torch.rand(size)} for size in sizes]


def test_one_sample_has_nothing_free() -> None:
    """Without INPUTS and with one sample, every dimension is fixed."""
    got = signature(lambda x: x.sum(1), x((2, 3)))
    assert (shapes(got.inputs), shapes(got.outputs), got.free) == ({"x": (2, 3)}, {"output": (2,)}, ())


def test_differing_sizes_are_free_and_named() -> None:
    """A leading size that differs is the batch; another is named after its input and axis."""
    got = signature(lambda x: x, x((1, 3, 8), (2, 5, 8)))
    assert shapes(got.inputs) == {"x": ("batch", "x_dim1", 8)}
    assert shapes(got.outputs) == {"output": ("batch", "x_dim1", 8)}


def test_sizes_that_go_together_share_a_name() -> None:
    """Two inputs whose sizes are equal in every sample have one free dimension, and others their own."""
    samples = [{"x": torch.rand(b, s), "y": torch.rand(b, t)} for b, s, t in ((1, 3, 3), (2, 5, 4))]
    got = signature(lambda x, y: (x, y), samples)
    assert shapes(got.inputs) == {"x": ("batch", "x_dim1"), "y": ("batch", "y_dim1")}
    assert shapes(got.outputs) == {"output_0": ("batch", "x_dim1"), "output_1": ("batch", "y_dim1")}


def test_a_second_leading_size_is_no_batch() -> None:
    """Two inputs whose leading sizes differ from each other have two free dimensions."""
    samples = [{"x": torch.rand(b, 2), "y": torch.rand(n, 2)} for b, n in ((1, 4), (2, 3), (3, 4))]
    assert shapes(signature(lambda x, y: (x, y), samples).inputs) == {"x": ("batch", 2), "y": ("y_dim0", 2)}


@pytest.mark.parametrize("sizes", [[(3, 3), (3, 5), (4, 4)], [(1, 2), (1, 3), (1, 4), (1, 5), (1, 6), (8, 2)]])
def test_batch_and_sequence_that_coincide(sizes: list[tuple[int, int]]) -> None:
    """Dimensions that are equal, or do not change, in some samples must still be told apart in the outputs."""
    got = signature(lambda x: x.T, x(*sizes))
    assert shapes(got.outputs) == {"output": ("x_dim1", "batch")}


def test_declared_dimensions_are_told_apart_without_samples_of_their_own() -> None:
    """With one square sample the outputs' dimensions are learned at derived sizes."""
    got = signature(lambda x: (x.T, x.mean(0)), x((4, 4)), {"x": ("batch", "time")})
    assert shapes(got.outputs) == {"output_0": ("time", "batch"), "output_1": ("time",)}


def test_a_fixed_output_is_not_free() -> None:
    """An output of the batch's size by chance, and one without a batch, are fixed."""
    got = signature(lambda x: (x.new_ones(2, 5), x.sum((0, 1), keepdim=True)), x((2, 3)), {"x": ("batch", 3)})
    assert shapes(got.outputs) == {"output_0": (2, 5), "output_1": (1, 1)}


def test_an_output_of_its_own_size_gets_its_own_name() -> None:
    """A size that follows no input dimension exactly, such as twice the length, has a name of its own."""
    got = signature(lambda x: torch.cat([x, x], 1), x((1, 3), (2, 4)))
    assert shapes(got.outputs) == {"output": ("batch", "output_dim1")}


def test_partial_inputs() -> None:
    """INPUTS may name some inputs; the others are taken from the samples, and equal sizes get the declared name."""
    samples = [{"x": torch.rand(b, s), "y": torch.rand(s)} for b, s in ((1, 3), (2, 5))]
    got = signature(lambda x, y: x + y, samples, {"x": ("batch", "time")})
    assert shapes(got.inputs) == {"x": ("batch", "time"), "y": ("time",)}


def test_a_batch_that_is_declared_is_not_named_twice() -> None:
    """A leading size that is not the declared batch must not be called batch."""
    samples = [{"x": torch.rand(b, 2), "y": torch.rand(n, 2)} for b, n in ((1, 4), (2, 3), (3, 4))]
    got = signature(lambda x, y: (x, y), samples, {"x": ("batch", 2)})
    assert shapes(got.inputs) == {"x": ("batch", 2), "y": ("y_dim0", 2)}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.float64, torch.uint8, torch.float16])
def test_types(dtype: torch.dtype) -> None:
    """Types must be NumPy's names, of inputs and outputs, also of rank 0."""
    samples = [{"x": torch.ones(2, dtype=dtype), "y": torch.tensor(3)}]
    got = signature(lambda x, y: (x, y * 2), samples)
    name = str(dtype).removeprefix("torch.")
    assert [s.dtype for s in (*got.inputs, *got.outputs)] == [name, "int64", name, "int64"]
    assert got.inputs[1].shape == got.outputs[1].shape == ()


def test_bfloat16_is_refused() -> None:
    """A type that NumPy lacks must be refused by name with what to do."""
    with pytest.raises(InputRefused, match="bfloat16") as caught:
        signature(lambda x: x, [{"x": torch.ones(2, dtype=torch.bfloat16)}])
    assert caught.value.fix is not None and "float32" in caught.value.fix
    with pytest.raises(InputRefused, match=r"'output' must be of a type that NumPy has \(got torch.bfloat16"):
        signature(lambda x: x.bfloat16(), x((2, 2)))


def test_a_module_that_changes_its_input() -> None:
    """Samples must be as they were after a module has worked in place."""
    samples = x((2, 2))
    before = samples[0]["x"].clone()
    signature(lambda x: x.mul_(0), samples)
    assert torch.equal(samples[0]["x"], before)


def test_the_order_of_a_later_sample_does_not_matter() -> None:
    """Samples are dicts: the first one's order is the signature's."""
    samples = [{"x": torch.rand(2), "y": torch.rand(3)}, {"y": torch.rand(3), "x": torch.rand(2)}]
    assert signature(lambda x, y: (x, y), samples).input_names == ("x", "y")


ONE = torch.rand(2, 3)
BAD: dict[str, tuple[list[dict[str, Any]], dict[str, Any] | None, str]] = {
    "none": ([], None, "at least one sample"),
    "name": ([{"z": ONE}], None, "unknown: z"),
    "lacks": ([{"y": ONE}], None, "missing: x"),
    "other names": ([{"x": ONE}, {"x": ONE, "y": ONE}], None, "sample 1 has x, y"),
    "type": ([{"x": ONE}, {"x": ONE.double()}], None, "sample 1: torch.float64, rank 2"),
    "rank": ([{"x": ONE}, {"x": ONE[0]}], None, "sample 1: torch.float32, rank 1"),
    "nan": ([{"x": ONE}, {"x": ONE * float("nan")}], None, "sample 1 holds NaN"),
    "infinity": ([{"x": ONE / 0}], None, "sample 0 holds NaN or infinity"),
    "declared name": ([{"x": ONE}], {"X": (2, 3)}, "unknown: X"),
    "declared rank": ([{"x": ONE}], {"x": ("batch",)}, "shape of rank 2"),
    "declared size": ([{"x": ONE}], {"x": ("batch", 4)}, "sample 0 must fit INPUTS"),
    "declared twice": ([{"x": ONE}], {"x": ("n", "n")}, "sample 0 must fit INPUTS"),
    "declared none": ([{"x": ONE}], {"x": (None, 3)}, "a size or a name (got None"),
    "declared minus": ([{"x": ONE}], {"x": (-1, 3)}, "a size or a name (got -1"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_samples_are_refused(name: str) -> None:
    """Samples that do not fit the module, each other or INPUTS must be refused with what is wrong."""
    samples, declared, sentence = BAD[name]
    with pytest.raises(InputRefused) as caught:
        signature(lambda x, *_: x, samples, declared)
    assert caught.value.code == "DT303" and sentence in str(caught.value)


def test_a_free_dimension_that_is_not_free() -> None:
    """A module that fails at sizes which INPUTS allow must be refused with those sizes, before anything is built."""
    with pytest.raises(InputRefused) as caught:
        signature(lambda x: x.view(2, 3) + 1, x((2, 3)), {"x": ("batch", "time")})
    assert caught.value.code == "DT303"
    assert "RuntimeError at batch=" in str(caught.value)


def test_outputs_must_be_the_same_for_every_sample() -> None:
    """An output that is sometimes there cannot have a place in the signature."""
    with pytest.raises(InputRefused, match="same outputs"):
        signature(lambda x: {"a": x, "b": x if len(x) > 1 else None}, x((1, 3), (2, 3)))
    with pytest.raises(InputRefused, match="at least one tensor"):
        signature(lambda x: None, x((1, 3)))

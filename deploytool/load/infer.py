"""The signature of a module, from its samples: names, types, and which dimensions are free."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused, nearest
from deploytool.load.flat import named_outputs
from deploytool.signature import Dim, Signature, TensorSpec

Sample = Mapping[str, Tensor]
Declared = Mapping[str, Sequence[Dim]]
_RUNS = 4  # shapes that the module is run at to learn how the outputs' sizes follow the inputs'


def infer_signature(module: nn.Module, samples: Sequence[Sample], declared: Declared | None) -> Signature:
    """Inputs from `declared` and the samples, outputs from running the module on a few of them.

    `declared` maps an input's name to its shape, a free dimension by name. Where it says nothing, a dimension that
    differs between samples is free; dimensions whose sizes go together in every sample get one name.
    """
    _check_samples(module, samples)
    inputs = _inputs(samples, declared or {})
    runs = _distinct(samples)
    with torch.inference_mode():
        outputs = [named_outputs(module(**run)) for run in runs]
    if not outputs[0]:
        raise InputRefused("DT302", "the model must return at least one tensor (got none)")
    sizes = [_free_sizes(inputs, run) for run in runs]
    names = list(outputs[0])
    return Signature(inputs, tuple(_output(name, [o[name] for o in outputs], sizes) for name in names))


def dtype_name(name: str, tensor: Tensor) -> str:
    """NumPy's name of a tensor's type; bfloat16 and the like, which NumPy lacks, are refused."""
    try:
        return torch.empty(0, dtype=tensor.dtype).numpy().dtype.name
    except TypeError as error:
        raise InputRefused("DT303", f"{name!r} must be of a type that NumPy has (got {tensor.dtype})",
                           fix="convert it to float32 in the model") from error  # fmt: skip


def _check_samples(module: nn.Module, samples: Sequence[Sample]) -> None:
    if not samples:
        raise InputRefused("DT303", "samples() must give at least one sample (got none)")
    first = samples[0]
    parameters = inspect.signature(module.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        unknown = [n for n in first if n not in names]
        needed = [p.name for p in parameters if p.default is p.empty and p.name in names and p.name not in first]
        if unknown or needed:
            detail = [f"unknown: {n}; {nearest(n, names)}" for n in unknown] + [f"missing: {n}" for n in needed]
            raise InputRefused("DT303", f"samples must be named as forward()'s parameters {', '.join(names)} "
                               f"(got {', '.join(first) or 'none'})", detail=detail)  # fmt: skip
    for index, sample in enumerate(samples):
        if list(sample) != list(first):
            raise InputRefused("DT303", f"every sample must have the inputs {', '.join(first)} "
                               f"(sample {index} has {', '.join(sample)})")  # fmt: skip
        for name, value in sample.items():
            if (value.dtype, value.ndim) != (first[name].dtype, first[name].ndim):
                raise InputRefused("DT303", f"input {name!r} must be {first[name].dtype} of rank {first[name].ndim} in "
                                   f"every sample (sample {index}: {value.dtype}, rank {value.ndim})")  # fmt: skip
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputRefused("DT303", f"input {name!r} must be finite (sample {index} holds NaN or infinity)")


def _inputs(samples: Sequence[Sample], declared: Declared) -> tuple[TensorSpec, ...]:
    unknown = [name for name in declared if name not in samples[0]]
    if unknown:
        raise InputRefused("DT303", f"INPUTS must name the samples' inputs {', '.join(samples[0])}",
                           detail=[f"unknown: {n}; {nearest(n, samples[0])}" for n in unknown])  # fmt: skip
    named: dict[tuple[int, ...], str] = {}
    specs = []
    for name, value in samples[0].items():
        shape = tuple(declared[name]) if name in declared else _observed(name, samples, named)
        specs.append(TensorSpec(name, dtype_name(name, value), shape))
    signature = Signature(tuple(specs), ())
    for index, sample in enumerate(samples):
        try:
            signature.bind({n: v.numpy() for n, v in sample.items()})
        except InputRefused as error:
            raise InputRefused("DT303", f"sample {index} must fit INPUTS: {error.message}") from error
    return signature.inputs


def _observed(name: str, samples: Sequence[Sample], named: dict[tuple[int, ...], str]) -> tuple[Dim, ...]:
    shape: list[Dim] = []
    for axis, size in enumerate(samples[0][name].shape):
        sizes = tuple(s[name].shape[axis] for s in samples)
        if len(set(sizes)) == 1:
            shape.append(size)
            continue
        fresh = "batch" if axis == 0 and "batch" not in named.values() else f"{name}_dim{axis}"
        shape.append(named.setdefault(sizes, fresh))
    return tuple(shape)


def _distinct(samples: Sequence[Sample]) -> list[Sample]:
    """Up to `_RUNS` samples of different shapes, the smallest first."""
    by_shape = {tuple(tuple(v.shape) for v in s.values()): s for s in reversed(samples)}
    return sorted(by_shape.values(), key=lambda s: sum(v.numel() for v in s.values()))[:_RUNS]


def _free_sizes(inputs: tuple[TensorSpec, ...], sample: Sample) -> dict[str, int]:
    return {
        dim: size
        for spec in inputs
        for dim, size in zip(spec.shape, sample[spec.name].shape, strict=True)
        if isinstance(dim, str)
    }


def _output(name: str, values: Sequence[Tensor], sizes: Sequence[dict[str, int]]) -> TensorSpec:
    shape: list[Dim] = []
    for axis in range(values[0].ndim):
        seen = [v.shape[axis] for v in values]
        candidates = [dim for dim in sizes[0] if [s[dim] for s in sizes] == seen]
        if candidates and (axis == 0 or len(set(seen)) > 1):
            shape.append(candidates[0])
        elif len(set(seen)) == 1:
            shape.append(seen[0])
        else:
            shape.append(f"{name}_dim{axis}")
    return TensorSpec(name, dtype_name(name, values[0]), tuple(shape))


def refuse_non_finite(state: Mapping[str, Any]) -> None:
    """Raise InputRefused naming the weights that hold NaN or infinity."""
    bad = [n for n, t in state.items() if isinstance(t, Tensor) and t.is_floating_point()
           and not bool(torch.isfinite(t).all())]  # fmt: skip
    if bad:
        raise InputRefused("DT304", f"every weight must be finite (got NaN or infinity in {len(bad)})",
                           detail=bad[:10], fix="train or convert the model again")  # fmt: skip

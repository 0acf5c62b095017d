"""The signature of a module, from its samples: names, types, and which dimensions are free."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused, nearest
from deploytool.load.flat import named_outputs, no_fast_path
from deploytool.load.variants import parity_feeds
from deploytool.signature import Dim, Signature, TensorSpec

Sample = Mapping[str, Tensor]
Declared = Mapping[str, Sequence[Dim]]
Seen = dict[int, dict[str, Tensor]]


def infer_signature(
    module: nn.Module, samples: Sequence[Sample], declared: Declared | None, seen: Seen | None = None
) -> Signature:
    """Inputs from `declared` and the samples, outputs from running the module at a few sizes.

    `declared` maps an input's name to its shape, a free dimension by name. Where it says nothing, a dimension that
    differs between samples is free; dimensions whose sizes go together in every sample get one name. `seen` gets the
    outputs of the samples that were run, by their index.
    """
    _check_samples(module, samples)
    inputs = _inputs(samples, declared or {})
    runs = _telling(inputs, samples)
    outputs = [_outputs(module, run, _free_sizes(inputs, run), made=index >= len(samples)) for run, index in runs]
    if not outputs[0]:
        raise InputRefused("DT302", "the model must return at least one tensor (got none)")
    sizes = [_free_sizes(inputs, run) for run, _ in runs]
    names = list(outputs[0])
    if differing := [o for o in outputs if list(o) != names]:
        raise InputRefused("DT302", f"the model must return the same outputs for every sample (got {', '.join(names)} "
                           f"and {', '.join(differing[0])})")  # fmt: skip
    if seen is not None:
        seen.update((index, o) for (_, index), o in zip(runs, outputs, strict=True) if index < len(samples))
    return Signature(inputs, tuple(_output(name, [o[name] for o in outputs], sizes) for name in names))


def _outputs(module: nn.Module, run: Sample, sizes: Mapping[str, int], *, made: bool) -> dict[str, Tensor]:
    copies = {name: value.clone() for name, value in run.items()}  # a module may change its inputs in place
    try:
        with torch.inference_mode(), no_fast_path():
            return named_outputs(module(**copies))
    except Exception as error:
        if not made or isinstance(error, InputRefused):
            raise
        raise refused_size(error, sizes) from error


def refused_size(error: Exception, sizes: Mapping[str, int]) -> InputRefused:
    """What to say when a module fails at sizes that its free dimensions allow but its samples do not show."""
    said = ", ".join(f"{dim}={size}" for dim, size in sizes.items())
    return InputRefused("DT303", f"the model must run at any size of its free dimensions (got {type(error).__name__} "
                        f"at {said})", detail=[str(error)[:500]],
                        fix="give samples at three or more sizes of each free dimension, or fix sizes in INPUTS"
                        )  # fmt: skip


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
            raise InputRefused("DT303", f"samples must be named as the parameters of forward(), {', '.join(names)} "
                               f"(got {', '.join(first) or 'none'})", detail=detail)  # fmt: skip
    for index, sample in enumerate(samples):
        if set(sample) != set(first):
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
    named = _declared_sizes(samples, declared)
    free = {dim for shape in declared.values() for dim in shape if isinstance(dim, str)}
    specs = []
    for name, value in samples[0].items():
        shape = tuple(declared[name]) if name in declared else _observed(name, samples, named, free)
        specs.append(TensorSpec(name, dtype_name(name, value), shape))
    signature = Signature(tuple(specs), ())
    for index, sample in enumerate(samples):
        try:
            signature.bind({n: v.numpy() for n, v in sample.items()})
        except InputRefused as error:
            raise InputRefused("DT303", f"sample {index} must fit INPUTS: {error.message}") from error
    return signature.inputs


def _declared_sizes(samples: Sequence[Sample], declared: Declared) -> dict[tuple[int, ...], str]:
    """The free dimensions of INPUTS by their sizes in all samples, so that other inputs' get the same names."""
    named: dict[tuple[int, ...], str] = {}
    for name, shape in declared.items():
        if wrong := [d for d in shape if not isinstance(d, str) and not (type(d) is int and d >= 0)]:
            raise InputRefused("DT303", f"a dimension in INPUTS must be a size or a name (got {wrong[0]!r} "
                               f"for {name!r})")  # fmt: skip
        if len(shape) != samples[0][name].ndim:
            raise InputRefused("DT303", f"INPUTS must give {name!r} a shape of rank {samples[0][name].ndim} "
                               f"(got {list(shape)})")  # fmt: skip
        for axis, dim in enumerate(shape):
            sizes = tuple(s[name].shape[axis] for s in samples)
            if isinstance(dim, str) and len(set(sizes)) > 1:
                named.setdefault(sizes, dim)
    return named


def _observed(
    name: str, samples: Sequence[Sample], named: dict[tuple[int, ...], str], declared: set[str]
) -> tuple[Dim, ...]:
    shape: list[Dim] = []
    for axis, size in enumerate(samples[0][name].shape):
        sizes = tuple(s[name].shape[axis] for s in samples)
        if len(set(sizes)) == 1:
            shape.append(size)
            continue
        taken = {*named.values(), *declared}
        fresh = "batch" if axis == 0 and "batch" not in taken else f"{name}_dim{axis}"
        shape.append(named.setdefault(sizes, fresh))
    return tuple(shape)


def _telling(inputs: tuple[TensorSpec, ...], samples: Sequence[Sample]) -> list[tuple[Sample, int]]:
    """Samples whose sizes tell the free dimensions apart, and from fixed ones: the smallest that do, and their index.

    Where the samples cannot, the feeds that parity will derive from them, which come after them all.
    """
    arrays = [{spec.name: sample[spec.name].numpy() for spec in inputs} for sample in samples]
    feeds = parity_feeds(Signature(inputs, ()), arrays)
    runs = [({name: torch.from_numpy(array) for name, array in feed.items()}, index)
            for index, feed in enumerate(feeds)]  # fmt: skip
    runs.sort(key=lambda r: (r[1] >= len(samples), sum(value.numel() for value in r[0].values())))
    kept: list[tuple[Sample, int]] = []
    told = -1
    for run, index in runs:
        tells = _tells([_free_sizes(inputs, r) for r in (*(k for k, _ in kept), run)])
        if tells > told:
            kept.append((run, index))
            told = tells
    return kept


def _tells(sizes: Sequence[Mapping[str, int]]) -> int:
    """How many dimensions vary, and how many differ from all others."""
    columns = [tuple(s[dim] for s in sizes) for dim in sizes[0]]
    return sum(len(set(column)) > 1 for column in columns) + len(set(columns))


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


def refuse_non_finite(module: nn.Module) -> None:
    """Raise InputRefused naming the parameters with NaN or infinity and the buffers with NaN: masks hold infinity."""
    bad = [name for name, tensor in module.named_parameters() if not _bounds(tensor).isfinite().all()]
    bad += [name for name, tensor in module.named_buffers() if _bounds(tensor).isnan().any()]
    if bad:
        raise InputRefused("DT304", f"every weight must be finite (got NaN or infinity in {len(bad)})",
                           detail=bad[:10], fix="train or convert the model again")  # fmt: skip


def _bounds(tensor: Tensor) -> Tensor:
    """Smallest and largest element, [2]; both are NaN where one is. No temporary of the tensor's size."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return torch.zeros(2)
    return torch.stack(torch.aminmax(tensor.detach()))

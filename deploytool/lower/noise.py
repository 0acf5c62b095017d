"""The reference's own noise: how far a model's outputs move when nothing but rounding changes.

Every figure is the relative error of the worst sample against the recorded outputs:

    fp64      the same module in double precision: what fp32 itself costs
    shuffled  the sums of linear and convolutional layers in another order, as another engine takes them
    fp16      weights, and outputs of every layer, rounded to half precision
    int8      weights rounded to 7 bits per output channel, inputs of linear and convolutional layers to 8 bits
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional

from deploytool.cases import read_cases
from deploytool.difference import Difference
from deploytool.load.model import open_source
from deploytool.signature import Outputs
from deploytool.source import ModelRef, Source
from deploytool.storage import write_json

NOISE = "noise.json"
_SHUFFLES = 2
_CASES = 16
_SHARE_OF_MEMORY = 0.5  # of what is free, which a copy in another precision may take
_SUMMING = (nn.Linear, nn.Conv1d, nn.Conv2d)
_RECURRENT = (nn.LSTM, nn.GRU, nn.RNN, nn.MultiheadAttention)

Changed = Callable[[nn.Module, Tensor], Tensor]
Modules = Generator[nn.Module, None, None]


def noise_job(ref: Mapping[str, str], prepared: str) -> dict[str, Any]:
    """Measure, and write to the prepared folder (in a worker): {"outputs": {name: figures}, "skipped": {figure: why}}.

    A figure that cannot be taken is left out, with the reason.
    """
    source, folder = open_source(ModelRef(**ref)), Path(prepared)
    found: dict[str, dict[str, float]] = {name: {} for name in source.signature.output_names}
    skipped: dict[str, str] = {}
    for figure, measure in _measures(source).items():
        if isinstance(measure, str):
            skipped[figure] = measure
            continue
        try:
            with closing(measure()) as modules:
                found_here = _errors(source, modules, folder / "cases")
            for name, error in found_here.items():
                found[name][figure] = max(error, found[name].get(figure, 0.0))
        except Exception as error:  # the user's module in another precision may raise anything
            skipped[figure] = f"the module does not run so: {type(error).__name__}: {str(error)[:200]}"
    result = {"outputs": found, "skipped": skipped, "shuffles": _SHUFFLES}
    write_json(folder / NOISE, result)
    return result


def _measures(source: Source) -> dict[str, Callable[[], Modules] | str]:
    """By figure what gives the changed modules, one after the other, or why there are none."""
    module = source.flat
    recurrent = any(isinstance(layer, _RECURRENT) for layer in source.module.modules())
    return {
        "fp64": _too_large(module, 8) or (lambda: _in_double(module)),
        "shuffled": lambda: _hooked(module, [_shuffled(seed) for seed in range(_SHUFFLES)]),
        "fp16": _too_large(module, 4) or (lambda: _rounded_to_half(module)),
        "int8": "recurrent and fused attention layers are not simulated" if recurrent
                else lambda: _hooked(module, [_int8]),
    }  # fmt: skip


def _too_large(module: nn.Module, bytes_each: int) -> str:
    """Why there is no copy of the parameters in so many bytes each, or nothing."""
    size, free = bytes_each * sum(p.numel() for p in module.parameters()), psutil.virtual_memory().available
    fits = size <= _SHARE_OF_MEMORY * free
    return "" if fits else f"a copy takes {size / 1e6:.0f} MB, and {free / 1e6:.0f} MB of memory are free"


def _errors(source: Source, modules: Iterable[nn.Module], cases: Path) -> dict[str, float]:
    names = source.signature.output_names
    batched = {spec.name: bool(spec.shape) and spec.shape[0] == "batch" for spec in source.signature.outputs}
    differences = {name: Difference(name, batched[name]) for name in names}
    for module in modules:
        for index, case in enumerate(itertools.islice(read_cases(cases), _CASES)):
            outputs = _run(module, source, case.inputs)
            for name, difference in differences.items():
                difference.add(index, case.reference[name], outputs[name].astype(case.reference[name].dtype))
    return {name: difference.error for name, difference in differences.items() if not difference.problems}


def _run(module: nn.Module, source: Source, inputs: Outputs) -> Outputs:
    double = any(p.dtype == torch.float64 for p in module.parameters())
    with torch.inference_mode():
        tensors = [torch.from_numpy(inputs[name].copy()) for name in source.signature.input_names]
        results = module(*(t.double() if double and t.is_floating_point() else t for t in tensors))
    return {name: tensor.numpy() for name, tensor in zip(source.signature.output_names, results, strict=True)}


def _in_double(module: nn.Module) -> Modules:
    yield copy.deepcopy(module).double()


def _hooked(module: nn.Module, changes: Iterable[Changed]) -> Modules:
    """The module once for each change, its summing layers giving what `changed` makes of their input meanwhile."""
    for changed in changes:
        handles = [
            layer.register_forward_hook(_replacing(changed), with_kwargs=True)
            for layer in module.modules()
            if type(layer) in _SUMMING and getattr(layer, "groups", 1) == 1
        ]
        try:
            yield module
        finally:
            for handle in handles:
                handle.remove()


def _replacing(changed: Changed) -> Callable[..., Tensor]:
    return lambda owner, given, named, output: changed(owner, given[0] if given else named["input"])


def _apply(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return functional.linear(x, weight, layer.bias)
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    result: Tensor = layer._conv_forward(x, weight, layer.bias)
    return result


def _shuffled(seed: int) -> Changed:
    def changed(layer: nn.Module, x: Tensor) -> Tensor:
        weight = layer.get_parameter("weight")
        order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(seed))
        axis = -1 if isinstance(layer, nn.Linear) else 1
        return _apply(layer, x.index_select(axis, order), weight.index_select(1, order))

    return changed


def _int8(layer: nn.Module, x: Tensor) -> Tensor:
    weight = layer.get_parameter("weight")
    step = weight.abs().amax(dim=tuple(range(1, weight.dim())), keepdim=True).clamp(min=1e-30) / 63
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    return _apply(layer, torch.round(x / scale) * scale, torch.round(weight / step) * step)


def _rounded_to_half(module: nn.Module) -> Modules:
    result = copy.deepcopy(module)
    for parameter in result.parameters():
        parameter.data = _half(parameter.data)
    for layer in result.modules():
        if not list(layer.children()):
            layer.register_forward_hook(lambda owner, given, output: _half(output))
    yield result


def _half(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype == torch.float32:
        return value.clamp(-65504, 65504).half().float()
    return value

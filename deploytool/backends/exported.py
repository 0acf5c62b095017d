"""Exported programs: a module in eval mode as torch.export writes it down, with the free dimensions of a signature."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deploytool.errors import InputRefused
from deploytool.load.flat import no_fast_path
from deploytool.load.input_grid import InputGrid
from deploytool.lower.export_failure import DATA_DEPENDENT, depends_on_data, reason
from deploytool.signature import Signature


def export_module(
    module: nn.Module, signature: Signature, arguments: tuple[Tensor, ...], largest: Mapping[str, int] | None = None
) -> ExportedProgram:
    """The module as an exported program, every free dimension free; raises InputRefused where torch fixes one.

    `largest` are sizes that free dimensions go up to, for compilers that plan memory by them; without it they are free.
    """
    bounds = {dim: Dim.DYNAMIC(max=max(size, 2)) for dim, size in (largest or {}).items()}  # torch fixes a size of 1
    free = tuple({axis: bounds.get(dim, Dim.DYNAMIC) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)}
                 for spec in signature.inputs)  # fmt: skip
    takes = inspect.signature(module.forward).parameters.values()
    together = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in takes)  # `*tensors` is one argument
    try:
        with torch.no_grad(), no_fast_path(), quiet(), _grids_in_pairs(module):
            return torch.export.export(module, arguments, dynamic_shapes=(free,) if together else free, strict=False)
    except Exception as error:  # what export raises has no common base, and the module's own code runs in it
        other = ("choose torchscript, or a target that lowers to ONNX; recurrent layers over a free number of steps "
                 "cannot be exported")  # fmt: skip
        raise InputRefused("DT310", f"torch.export must take the model with its free dimensions (got {reason(error)})",
                           detail=_fixed(str(error), signature),
                           fix=DATA_DEPENDENT if depends_on_data(error) else other) from error  # fmt: skip


def _fixed(said: str, signature: Signature) -> list[str]:
    """Which free dimensions torch fixes, in the signature's words; none where it says something else."""
    found = re.findall(r"(\d+)\](?:\.size\(\))?\[(\d+)\] as dynamic but .* to be a constant \((\d+)\)", said)
    places = ((signature.inputs[int(index)], int(axis), size) for index, axis, size in found)
    return [f"axis {axis} ({spec.shape[axis]!r}) of input {spec.name!r} is fixed at {size} by the model's code or by "
            "torch's own layers" for spec, axis, size in places]  # fmt: skip


@contextmanager
def _grids_in_pairs(module: nn.Module) -> Iterator[None]:
    """Learned input grids are exported as pairs of Q and DQ: torch does not know the shapes of its own simulation."""
    grids = [inner for inner in module.modules() if isinstance(inner, InputGrid)]
    for grid in grids:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # registers the operators
        grid.forward = _pair(grid)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for grid in grids:
            del grid.forward


def _pair(grid: InputGrid) -> Callable[[Tensor], Tensor]:
    numbers = (float(grid.scale), int(grid.zero_point), 0, 2**grid.bits - 1, torch.uint8)
    operators = torch.ops.quantized_decomposed

    def forward(x: Tensor) -> Tensor:
        result: Tensor = operators.dequantize_per_tensor(operators.quantize_per_tensor(x, *numbers), *numbers)
        return result

    return forward


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings of its own parts about each other; parity judges the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

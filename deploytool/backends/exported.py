"""Exported programs: a module in eval mode as torch.export writes it down, with the free dimensions of a signature."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from deploytool.errors import InputRefused
from deploytool.load.flat import no_fast_path
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
        with torch.no_grad(), no_fast_path(), quiet():
            return torch.export.export(module, arguments, dynamic_shapes=(free,) if together else free, strict=False)
    except Exception as error:  # what export raises has no common base, and the module's own code runs in it
        raise InputRefused("DT310", "torch.export must take the model with its free dimensions "
                                    f"(got {type(error).__name__}: {error})"[:2000],
                           fix="choose torchscript, or a target that lowers to ONNX; recurrent layers over a free "
                               "number of steps cannot be exported") from error  # fmt: skip


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings of its own parts about each other; parity judges the result."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

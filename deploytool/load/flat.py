"""One form for every module: tensors in, tensors out, in the order of the signature."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploytool.errors import InputRefused


class FlatModule(nn.Module):
    """Calls `module` by name with positional tensors and returns its outputs as a tuple, in a fixed order.

    torch's fast path stays off, as in every lowering, so that this is what they are compared with; with `fast_path` it
    is taken as torch's own users take it.
    """

    def __init__(
        self, module: nn.Module, input_names: tuple[str, ...], output_names: tuple[str, ...], *, fast_path: bool = False
    ):
        super().__init__()
        self.module = module
        self.fast_path = fast_path
        if fast_path:
            _warned_of_nested_tensors()
        self.input_names = input_names
        self.output_names = output_names
        self.train(module.training)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        # torch.export looks into this call, where its callers have switched the path off already.
        with nullcontext() if self.fast_path or torch.compiler.is_compiling() else no_fast_path():
            named = named_outputs(self.module(**dict(zip(self.input_names, tensors, strict=True))))
        return tuple(named[name] for name in self.output_names)


def named_outputs(value: Any) -> dict[str, Tensor]:
    """Names for every tensor in a module's outputs.

    A lone tensor is "output"; the n-th of a tuple "output_n"; a mapping or dataclass gives its own names; deeper
    ones are joined with a dot. None is left out. Anything else is refused.
    """
    if isinstance(value, Tensor):
        return {"output": value}
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        value = {f"output_{index}": item for index, item in enumerate(value)}
    pairs = list(_walk(value, ""))
    named = dict(pairs)
    if len(named) != len(pairs):
        raise InputRefused("DT302", f"every output must have a name of its own (got {', '.join(n for n, _ in pairs)})")
    return named


def _walk(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if value is None:
        return
    if isinstance(value, Tensor):
        yield name, value
        return
    for key, item in _children(value, name):
        yield from _walk(item, f"{name}.{key}" if name else str(key))


def _children(value: Any, name: str) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if dataclasses.is_dataclass(value):
        return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
    if hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return list(enumerate(value))
    raise InputRefused("DT302", f"output {name or 'of the model'!r} must be a tensor or nest tensors "
                       f"(got {type(value).__name__})",
                       fix="return tensors, tuples, dicts or dataclasses from forward()")  # fmt: skip


def as_tensor(name: str, value: Any) -> Tensor:
    """A sample's value as a tensor: tensors as they are, NumPy arrays and Python numbers converted.

    A Python bool becomes bool, an int int64, a float float32, each of rank 0.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, int):
        return torch.tensor(value, dtype=torch.int64)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    try:
        if isinstance(value, np.ndarray):
            return torch.from_numpy(value.copy())  # torch takes no read-only or reversed array
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputRefused("DT303", f"sample value {name!r} must be a tensor, an array or a number "
                           f"(got {type(value).__name__})") from error  # fmt: skip


@cache
def _warned_of_nested_tensors() -> None:
    """torch warns of nested tensors, which its fast path packs padded rows into, once in a process: here, unheard."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors")
        torch._nested_tensor_from_mask(torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool))


@contextmanager
def no_fast_path() -> Iterator[None]:
    """Keeps torch's fused attention on its plain way, in all threads.

    The other skips submodules, reads weights as tensors, which int8 ones are not, packs padded rows by the example's
    own padding, leaves zeros where a padding mask hides tokens, and has no translation to ONNX.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)

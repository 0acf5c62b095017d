"""Calls of a submodule, recorded while the whole model runs, and made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deploytool.load.flat import no_fast_path

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Reached(Exception):
    """Ends a run where a hook has seen all that it wants."""


@contextmanager
def plain_forward() -> Iterator[None]:
    """No gradients, and every submodule is called."""
    with no_fast_path(), torch.no_grad():
        yield


def record_calls(run: Callable[[], object], module: nn.Module, *, first_only: bool) -> list[Call]:
    """The arguments of every call of `module` while `run()` runs, copied before the module sees them.

    `first_only` ends the run at the first call.
    """
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(copy.deepcopy((args, kwargs)))
        if first_only:
            raise Reached

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        with plain_forward():
            run()
    except Reached:
        pass
    finally:
        handle.remove()
    return calls


def replay(module: nn.Module, call: Call) -> Any:
    """The module's outputs for a recorded call, which stays as it is: caches and tensors may be changed in place."""
    args, kwargs = copy.deepcopy(call)
    with plain_forward():
        return module(*args, **kwargs)


def sharing_equal(call: Call, other: Call) -> Call:
    """The call with those tensors of another one that equal its own, such as masks and positions, to hold them once."""
    mine, theirs = leaves(call), leaves(other)
    if len(mine) != len(theirs):
        return call
    made: Call = refill(call, (b if _equal(a, b) else a for a, b in zip(mine, theirs, strict=True)))
    return made


def _equal(one: Any, two: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(two, torch.Tensor):
        return False
    return one.dtype == two.dtype and one.device == two.device and torch.equal(one, two)


def leaves(value: Any) -> list[Any]:
    """What tuples, lists and dicts hold, depth first; anything else is a leaf."""
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    return [value]


def refill(value: Any, new: Iterator[Any]) -> Any:
    """The same nesting with the leaves taken from `new`, in the order of `leaves`."""
    if type(value) in (tuple, list):
        return type(value)(refill(item, new) for item in value)
    if isinstance(value, (tuple, list)):  # a named tuple takes its fields one by one
        return type(value)(*(refill(item, new) for item in value))
    if isinstance(value, dict):  # a copy keeps what its kind holds beside the items, as defaultdict does
        made = copy.copy(value)
        made.update({key: refill(item, new) for key, item in value.items()})
        return made
    if isinstance(value, Mapping):
        return type(value)({key: refill(item, new) for key, item in value.items()})  # type: ignore[call-arg]
    return next(new)

"""Random numbers that follow from the seed and the place in training alone, so that resuming needs no saved state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")
_State = tuple[torch.Tensor, dict[str, Any], Any]


def derived(*parts: int | str) -> int:
    """A seed of 63 bits that is different for every different tuple of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def reseed(*parts: int | str) -> None:
    """Start torch's, NumPy's and Python's global generators anew from `derived(*parts)`."""
    seed = derived(*parts)
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def isolated() -> Iterator[None]:
    """The caller's random state and determinism setting come back after the block, which runs deterministic kernels."""
    before, deterministic = _get(), torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        _set(before)


def drawn(make: Callable[[], Iterable[T]], *parts: int | str) -> Iterator[T]:
    """The items of `make()`, each made with a random state of their own that nothing outside changes or feels."""
    outside = _get()
    reseed("data", *parts)
    iterator, inside = iter(make()), None
    while True:
        if inside is not None:
            outside = _get()
            _set(inside)
        try:
            item = next(iterator)
        except StopIteration:
            return
        finally:
            inside = _get()
            _set(outside)
        yield item


def _get() -> _State:
    return torch.get_rng_state(), np.random.get_state(legacy=False), random.getstate()


def _set(state: _State) -> None:
    torch.set_rng_state(state[0])
    np.random.set_state(state[1])
    random.setstate(state[2])

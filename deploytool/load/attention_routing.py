"""Other attention inside the modules of a model: what they ask of scaled_dot_product_attention is computed otherwise.

A module keeps its class's code, parameters and names; only while its forward runs, torch's
scaled_dot_product_attention is answered by a kernel of attention_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from deploytool.load.attention_kernels import blockwise, sparse, tracing


@dataclass(frozen=True)
class Pattern:
    """Which keys a query sees, and in which blocks.

    block     tokens of a block: exact attention over all keys. 0: the sparse pattern of the others
    window    how far a query sees to either side, in tokens
    stride    besides, every stride-th block of `window` tokens; 0: none
    globals_  how many first tokens see and are seen by all
    """

    block: int = 0
    window: int = 0
    stride: int = 0
    globals_: int = 0

    def __post_init__(self) -> None:
        if min(self.block, self.window, self.stride, self.globals_) < 0 or (self.block > 0) == (self.window > 0):
            raise ValueError("an attention pattern must have a block or a window, above 0")

    def to_json(self) -> dict[str, int]:
        """What an edit holds of it."""
        return asdict(self)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
        """Attention of [batch, heads, n, d] by this pattern; raises ValueError where it cannot be taken."""
        if self.block:
            return blockwise(q, k, v, mask, scale, self.block, causal)
        if not tracing() and q.shape[2] != k.shape[2]:
            raise ValueError(f"sparse attention must be of a sequence to itself, not of {q.shape[2]} to {k.shape[2]}")
        return sparse(q, k, v, mask, scale, self.window, self.stride, self.globals_, causal)


class Rerouted(nn.Module):
    """Mixed into the class of a module whose attention is computed by `attention_pattern`."""

    attention_pattern: Pattern

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Routing(self.attention_pattern):
            return super().forward(*args, **kwargs)


def reroute(root: nn.Module, name: str, pattern: Pattern) -> nn.Module:
    """Let the module compute its attention by `pattern`, in place; a pattern that it had is replaced."""
    module = root.get_submodule(name)
    if not isinstance(module, Rerouted):
        kind: Any = type(module)
        module.__class__ = _rerouted(kind)
    module.attention_pattern = pattern  # type: ignore[assignment]
    return module


@dataclass(frozen=True)
class Site:
    """A module that asks for attention, and of what: one entry of `shapes` per call, queries' and keys' lengths."""

    name: str
    shapes: tuple[tuple[int, int], ...]
    heads: int


def attention_sites(root: nn.Module, run: Callable[[], object]) -> list[Site]:
    """The modules below `root` that call scaled_dot_product_attention themselves while `run()` runs, in that order."""
    names = {id(module): name for name, module in root.named_modules()}
    inside: list[int] = []
    found: dict[str, list[tuple[int, int]]] = {}
    heads: dict[str, int] = {}

    def enter(module: nn.Module, *_: Any) -> None:
        inside.append(id(module))

    def leave(module: nn.Module, *_: Any) -> None:
        if inside and inside[-1] == id(module):
            inside.pop()

    def seen(q: Tensor, k: Tensor) -> None:
        owner = next((names[i] for i in reversed(inside) if i in names), None)
        if owner is not None:
            found.setdefault(owner, []).append((q.shape[-2], k.shape[-2]))
            heads[owner] = q.shape[-3] if q.ndim > 2 else 1

    handles = [h for module in root.modules() for h in (
        module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True))]  # fmt: skip
    try:
        with torch.no_grad(), _Watching(seen):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return [Site(name, tuple(shapes), heads[name]) for name, shapes in found.items()]


class _Routing(TorchFunctionMode):
    def __init__(self, pattern: Pattern):
        super().__init__()
        self.pattern = pattern

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _answer(self.pattern, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Watching(TorchFunctionMode):
    def __init__(self, seen: Callable[[Tensor, Tensor], None]):
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func is scaled_dot_product_attention:
            query, key = (given[n] if n in given else args[i] for i, n in enumerate(("query", "key")))
            self.seen(query, key)
        return func(*args, **given)


def _answer(
    pattern: Pattern, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """scaled_dot_product_attention by the pattern; dropout of weights is left out, as the kernels hold no weights."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], dim=-3) for x in (key, value))
    mask = attn_mask
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, float("-inf"))
    lead = 4 - query.ndim
    if lead < 0:
        raise ValueError(f"attention must be of [batch, heads, tokens, width] (got {query.ndim} axes)")
    q, k, v = (x[(None,) * lead] for x in (query, key, value))
    mask = mask if mask is None else mask[(None,) * (4 - mask.ndim)]
    width = query.shape[-1]
    mixed = pattern.attend(q, k, v, mask, float(width) ** -0.5 if scale is None else scale, is_causal)
    return mixed[(0,) * lead] if lead else mixed


@cache
def _rerouted(kind: Any) -> type[nn.Module]:
    made: type[nn.Module] = type(kind.__name__, (Rerouted, kind), {"__module__": kind.__module__})
    return made

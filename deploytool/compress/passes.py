"""Passes over all calls of a module, each to the layers that are looked at next; what is computed once is kept.

    with Passes(block, calls, layers) as passes:
        for names in stages:                        # layers that read one tensor, in the order in which they read
            for x in passes.reach(names): ...       # what they read, call after call
            ...                                     # change these layers in place
            passes.release(names)
        outputs = passes.outputs()                  # what the changed module gives, call after call

Up to where a pass ends nothing changes any more. So what a layer gave there for a call, and what attention gave, lies
on a shelf, from which later passes take it: all passes together compute these once, and memory holds one call.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from deploytool.compress.calls import Call, Reached, leaves, plain_forward, refill
from deploytool.compress.shelf import Shelf, fresh

_COSTLY = frozenset({functional.scaled_dot_product_attention, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm,
                     Tensor.bmm, torch.softmax, Tensor.softmax, functional.softmax})  # fmt: skip


class Passes:
    """See the module's docstring.

    low  products are computed in bfloat16, as `forward` says

    `again` are layers that ran more than once in a call: what they read then nobody has seen.
    """

    def __init__(
        self, module: nn.Module, calls: Sequence[Call], layers: Mapping[str, nn.Module], *, low: bool = False
    ) -> None:
        self._module, self._calls, self._layers, self._low = module, calls, layers, low
        self._kept: dict[str, Shelf[Tensor | None]] = {}  # what the layers that are done gave
        self._between: list[Shelf[Tensor | None]] = []  # the same of what is costly and no layer, in its order
        self._stack = ExitStack()
        self.again: set[str] = set()

    def __enter__(self) -> Passes:
        if self._low:  # else the weights that autocast has cast are forgotten after every call
            torch.autocast_increment_nesting()
            self._stack.callback(_end_nesting)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stack.close()

    def reach(self, names: Collection[str]) -> Iterator[Tensor]:
        """What the named layers read: one tensor of each call that reaches one of them, in the calls' order."""
        for index in range(len(self._calls)):
            found: list[Tensor] = []
            self._run(index, names, found)
            yield from found

    def release(self, names: Iterable[str]) -> None:
        """The named layers are done: what they give is computed in the next pass, and kept."""
        for name in names:
            self._kept[name] = Shelf(expected=len(self._calls))
            weight = self._layers[name].get_parameter("weight")
            if self._low and not weight.requires_grad:  # of those that do autocast keeps its copy, one for all calls
                weight.requires_grad_(True)
                self._stack.callback(weight.requires_grad_, False)

    def outputs(self) -> Iterator[Any]:
        """What every call gives; all layers are released."""
        for index in range(len(self._calls)):
            yield self._run(index, (), [])

    def _run(self, index: int, names: Collection[str], found: list[Tensor]) -> Any:
        """One call, which ends where one of the named layers is reached: what it reads is put into `found`."""
        ran: set[str] = set()

        def look(name: str, x: Tensor) -> None:
            if name in ran:
                self.again.add(name)
            ran.add(name)
            if name in names:
                found.append(x)
                raise Reached

        with ExitStack() as stack:
            for name, layer in self._layers.items():
                hook = layer.register_forward_pre_hook(lambda m, args, n=name: look(n, args[0]))
                stack.callback(hook.remove)
            for name, kept in self._kept.items():
                layer = self._layers[name]
                stack.callback(_put_back, layer, layer.__dict__.get("forward"))
                layer.forward = partial(_once, kept, index, layer.forward)
            stack.callback(self._fill, index + 1)  # for what this call does not run
            try:
                with _Costly(partial(self._shelf, index), index):
                    return forward(self._module, fresh(self._calls, index), low=self._low)
            except Reached:
                return None

    def _shelf(self, index: int, number: int) -> Shelf[Tensor | None]:
        """That of the costly function which is called as number `number` in a call."""
        if number == len(self._between):
            self._between.append(Shelf(expected=len(self._calls)))
            self._fill(index)
        return self._between[number]

    def _fill(self, count: int) -> None:
        for kept in (*self._kept.values(), *self._between):
            while len(kept) < count:
                kept.append(None)


class _Costly(TorchFunctionMode):
    """Takes what costly functions give from their shelves."""

    def __init__(self, shelf: Callable[[int], Shelf[Tensor | None]], index: int) -> None:
        super().__init__()
        self._shelf, self._index, self._number = shelf, index, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _COSTLY:
            return func(*args, **(kwargs or {}))
        kept, self._number = self._shelf(self._number), self._number + 1
        return _once(kept, self._index, func, *args, **(kwargs or {}))


def _once(kept: Shelf[Tensor | None], index: int, compute: Any, *args: Any, **kwargs: Any) -> Tensor:
    """What is computed in this call, or was; a copy, since the module may write into it."""
    if index == len(kept):
        output: Tensor = compute(*args, **kwargs)
        with torch._C.DisableTorchFunction():  # what the shelf does is none of the module's functions
            kept.append(output, changing=True)
        return output
    with torch._C.DisableTorchFunction():
        before = kept.fresh(index)
    return compute(*args, **kwargs) if before is None else before


def _put_back(layer: nn.Module, own: Any) -> None:
    del layer.forward
    if own is not None:
        layer.forward = own


def _end_nesting() -> None:
    if torch.autocast_decrement_nesting() == 0:
        torch.clear_autocast_cache()


def forward(module: nn.Module, call: Call, *, low: bool) -> Any:
    """What the module gives for a call that it may write into.

    With `low` matrix products and attention take and give bfloat16 and sum up in float32, while norms and sums stay in
    float32, and so do the outputs.
    """
    with plain_forward(), torch.autocast("cpu", torch.bfloat16, enabled=low):
        output = module(*call[0], **call[1])
    if not low:
        return output
    return refill(output, (leaf.float() if isinstance(leaf, Tensor) and leaf.dtype == torch.bfloat16 else leaf
                           for leaf in leaves(output)))  # fmt: skip

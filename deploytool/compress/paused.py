"""Calls of one module that wait before its layers until these have been changed: one forward pass instead of two.

    with Paused(block, calls, layers) as paused:
        for names in stages:                    # layers that read one tensor, in the order in which they read
            inputs = paused.reach(names)        # one tensor for each call, which stands before them
            ...                                 # change these layers in place
            paused.release(names)
        outputs = list(paused.outputs())        # what the changed module gives

Every call runs in a thread of its own, and one of them at a time: Python can leave and enter a running forward in no
other way. What a call holds where it waits is held for all calls together.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.calls import Call, leaves, plain_forward, refill
from deploytool.load.flat import no_fast_path
from deploytool.load.memory import give_back, on_disk, share_arena

LARGE = 2**21  # bytes of what a call is about to read: it waits on disk
_TRIM = 8  # calls that may run before what they have freed between what they hold is returned to the system


class _Stopped(BaseException):
    """Unwinds a call that nobody waits for any more; no `except Exception` of a model keeps it."""


class _Pass(threading.Thread):
    """One call. `at` is the layer before which it stands, `x` what that layer is about to read."""

    def __init__(self, run: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.forward = run
        self.at: str | None = None
        self.x: Tensor | None = None
        self.output: Any = None
        self.error: BaseException | None = None
        self.ran: set[str] = set()
        self.stopped = self.over = False
        self.mine, self.drivers = threading.Semaphore(0), threading.Semaphore(0)

    def run(self) -> None:
        self.mine.acquire()
        try:
            if not self.stopped:
                self.output = self.forward()
        except _Stopped:
            pass
        except BaseException as error:  # it belongs to whoever drives the calls
            self.error = error
        finally:
            self.over = True
            self.drivers.release()

    def wait_at(self, name: str, x: Tensor) -> None:
        """Called in this thread, by the layer's hook."""
        self.at, self.x = name, x
        self.drivers.release()
        self.mine.acquire()
        if self.stopped:
            raise _Stopped

    def go_on(self) -> None:
        """Called by the driver: run until the next layer that is closed, or to the end."""
        self.at = self.x = None
        self.mine.release()
        self.drivers.acquire()
        if self.error is not None:
            raise self.error


class Paused:
    """See the module's docstring.

    written  positions among a call's leaves of tensors that the module writes into
    low      products are computed in bfloat16, as `forward` says

    `again` are layers that ran more than once in a call: what they read then nobody has seen.
    """

    def __init__(
        self, module: nn.Module, calls: Iterable[Call], layers: Mapping[str, nn.Module],
        written: Collection[int] = (), *, low: bool = False,
    ) -> None:  # fmt: skip
        self._passes = [_Pass(lambda call=call: forward(module, own(call, written), low=low)) for call in calls]  # type: ignore[misc]
        self._layers, self._closed, self._low = layers, set(layers), low
        self._running: _Pass | None = None
        self._stack = ExitStack()
        self.again: set[str] = set()

    def __enter__(self) -> Paused:
        with ExitStack() as stack:
            stack.enter_context(no_fast_path())  # from the first call's start to the last one's end
            for name, layer in self._layers.items():
                hook = layer.register_forward_pre_hook(lambda m, args, n=name: self._stand(n, args[0]))
                stack.callback(hook.remove)
            share_arena()
            stack.callback(self._stop)
            for one in self._passes:
                one.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        self._stack.close()

    def _stop(self) -> None:
        self._closed.clear()  # what a call still runs while it unwinds does not wait
        for one in self._passes:
            one.stopped = True
            one.mine.release()
            if one.ident is not None:  # else the system refused to start it
                one.join()

    def reach(self, names: Collection[str]) -> list[Tensor]:
        """What the named layers read: one tensor of each call that stands before one of them, in the calls' order.

        The tensors stay as they are until the next `reach`. A call that runs past the layers gives none.
        """
        found = []
        for number, one in enumerate(self._passes, 1):
            while one.at not in self._closed and not one.over:
                self._run(one)
            if one.at in names and one.x is not None:
                if one.x.nbytes >= LARGE:
                    one.x.data = on_disk(one.x.detach())
                found.append(one.x)
            if number % _TRIM == 0:
                give_back()
        return found

    def release(self, names: Iterable[str]) -> None:
        """The named layers are done: calls run through them from now on."""
        done = set(names)
        self._closed -= done
        for name in done if self._low else ():
            weight = self._layers[name].get_parameter("weight")
            if not weight.requires_grad:  # of those that do autocast keeps its copy, one for all calls
                weight.requires_grad_(True)
                self._stack.callback(weight.requires_grad_, False)

    def outputs(self) -> Iterator[Any]:
        """What every call gives; all layers are released."""
        self._closed.clear()
        for number, one in enumerate(self._passes, 1):
            while not one.over:
                self._run(one)
            output, one.output = one.output, None
            if number % _TRIM == 0:
                give_back()
            yield output

    def _run(self, one: _Pass) -> None:
        self._running = one
        try:
            one.go_on()
        finally:
            self._running = None

    def _stand(self, name: str, x: Tensor) -> None:
        one = self._running
        if one is None:
            return
        if name in one.ran:
            self.again.add(name)
        one.ran.add(name)
        if name in self._closed:
            one.wait_at(name, x)


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


def own(call: Call, written: Collection[int]) -> Call:
    """A copy of the call that shares its tensors, but not those at the positions `written` among its leaves."""
    shared = {id(leaf): leaf for position, leaf in enumerate(leaves(call))
              if isinstance(leaf, Tensor) and position not in written}  # fmt: skip
    made: Call = copy.deepcopy(call, shared)
    return made

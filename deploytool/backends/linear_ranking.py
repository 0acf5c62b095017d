"""The linear layers of a live module: which are really called, and which stay fp32 when the others become int8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deploytool.backends import sensitivity, tables
from deploytool.backends.base import Request
from deploytool.backends.eager import as_tuple, positional
from deploytool.errors import UsageProblem, nearest
from deploytool.signature import Feeds


def plain_linears(module: nn.Module, exclude: Collection[str]) -> dict[str, nn.Linear]:
    """Linears that do what the class does: no subclass (nn.MultiheadAttention's output), no hooks, no own forward."""
    return {
        name: inner
        for name, inner in module.named_modules()
        if type(inner) is nn.Linear and not is_inside(name, exclude) and inner.weight.dtype == torch.float32
        and not inner._forward_hooks and not inner._forward_pre_hooks and "forward" not in vars(inner)
    }  # fmt: skip


def is_inside(name: str, excluded: Collection[str]) -> bool:
    """Whether a module is one of those that are named, or inside of one."""
    return any(name == other or name.startswith(f"{other}.") for other in excluded)


def check_names(module: nn.Module, exclude: Collection[str]) -> None:
    """Raise UsageProblem where `exclude` names what is no module of this one."""
    names = [name for name, _ in module.named_modules()]
    unknown = [name for name in exclude if name not in names]
    if unknown:
        raise UsageProblem("DT202", f"build.exclude must name modules of the model (got {', '.join(unknown)})",
                           detail=[nearest(name, names) for name in unknown[:5]])  # fmt: skip


class LinearRanking:
    """Measures linears by hooks on a module in eval mode; the module is left as it was."""

    def __init__(
        self, module: nn.Module, linears: Mapping[str, nn.Linear], request: Request,
        options: tables.FbgemmBuild | tables.InductorInt8Build,
    ):  # fmt: skip
        self.module, self.request, self.options = module, request, options
        self.feeds = sensitivity.spread(request.calibration(), options.samples)
        self.weights = {name: linear.weight.detach().numpy().T for name, linear in linears.items()}
        self.errors: dict[str, float] = {}
        self.linears = linears
        self._measure_errors()

    @property
    def called(self) -> list[str]:
        """Linears that ran. The weight of one that did not run may be read by other code, as tensors only."""
        return list(self.errors)

    def kept(self) -> list[str]:
        """Names of the called linears that stay fp32."""
        if not sensitivity.worth_ranking(len(self.errors), self.options.keep_fp32):
            return []
        effects = dict.fromkeys(sensitivity.candidates(self.errors, self.options.keep_fp32), 0.0)
        for feeds in self.feeds:
            reference = self._run(feeds)
            for name in effects:
                with _hook(self.linears[name], self._adding_noise(name)):
                    noisy = self._run(feeds)
                effects[name] = max(effects[name], sensitivity.output_loss(reference, noisy))
        return sensitivity.most_sensitive(effects, len(self.errors), self.options.keep_fp32,
                                          self.request.target.parity.cosine_min)  # fmt: skip

    def _measure_errors(self) -> None:
        hooks = [linear.register_forward_hook(self._recording(name)) for name, linear in self.linears.items()]
        try:
            for feeds in self.feeds:
                self._run(feeds)
        finally:
            for hook in hooks:
                hook.remove()

    def _recording(self, name: str) -> Callable[..., None]:
        def record(linear: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            error = sensitivity.own_error(arguments[0].numpy(), self.weights[name], self.options.weight_bits)
            self.errors[name] = max(self.errors.get(name, 0.0), error)

        return record

    def _adding_noise(self, name: str) -> Callable[..., Tensor]:
        def add(linear: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
            noise = sensitivity.int8_noise(arguments[0].numpy(), self.weights[name], self.options.weight_bits)
            return output + torch.from_numpy(noise)

        return add

    def _run(self, feeds: Feeds) -> list[np.ndarray]:
        with torch.inference_mode():
            outputs = as_tuple(self.module(*positional(self.request.signature, feeds)))
        return [output.numpy() for output in outputs]


@contextmanager
def _hook(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(function)
    try:
        yield
    finally:
        handle.remove()

"""Losses between inner layers of student and teacher: hidden states and relations, layer by layer as mapped.

Hidden states: mean squared distance, after a learned linear map where the widths differ (Jiao et al., "TinyBERT", EMNLP
Findings 2020, equation 8). Which of n teacher blocks the i-th of m student blocks learns from: number (i + 1) n / m.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from deploytool.compress.distill.relation import relation_loss
from deploytool.compress.distill.tables import Distill
from deploytool.compress.distill.taps import Taps
from deploytool.errors import UsageProblem

_STUDENT = "student"


def uniform_map(student: int, teacher: int) -> list[int]:
    """The teacher block, counted from 0, that each student block learns from; the last learns from the last."""
    return [(index + 1) * teacher // student - 1 for index in range(student)]


class InnerLosses:
    """Taps on both models while they train; `loss()` compares what the newest run of each left there."""

    def __init__(self, student: nn.Module, teacher: nn.Module, settings: Distill):
        self.hidden = _mapped(settings.hidden, student, teacher)
        self._settings = settings
        self._relations = settings.relations
        self._taps = (
            Taps(student, {*self.hidden, *self._relations}, "student"),
            Taps(teacher, {*self.hidden.values(), *self._relations.values()}, "teacher"),
        )
        self._projections = nn.ModuleDict()
        for name, other in self.hidden.items():
            widths = _width(student, name), _width(teacher, other)
            if None not in widths and widths[0] != widths[1]:
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    self._projections[name.replace(".", ":")] = nn.Linear(*widths, bias=False)  # type: ignore[arg-type]

    def with_projections(self, student: nn.Module) -> nn.Module:
        """The module to train: the student, with the learned maps where there are any."""
        return nn.ModuleDict({_STUDENT: student, "maps": self._projections}) if self._projections else student

    def name(self, parameter: str) -> str:
        """A student's parameter as `with_projections` names it."""
        return f"{_STUDENT}.{parameter}" if self._projections else parameter

    def loss(self) -> Tensor | float:
        """Both weighted sums; 0 where nothing is mapped."""
        given, wanted = (taps.outputs for taps in self._taps)
        value: Tensor | float = 0.0
        for name, other in self.hidden.items():
            value = value + self._settings.hidden_weight * mse_loss(self._projected(name, given[name]), wanted[other])
        for name, other in self._relations.items():
            _check_heads(given[name], wanted[other], name, self._settings.relation_heads)
            value = value + self._settings.relation_weight * relation_loss(
                given[name], wanted[other], self._settings.relation_heads)  # fmt: skip
        return value

    def _projected(self, name: str, states: Tensor) -> Tensor:
        key = name.replace(".", ":")
        return self._projections[key](states) if key in self._projections else states

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        for taps in self._taps:
            self._stack.enter_context(taps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()


def _mapped(hidden: dict[str, str] | str, student: nn.Module, teacher: nn.Module) -> dict[str, str]:
    if not isinstance(hidden, str):
        return dict(hidden)
    lists = [dict(m.named_modules()).get(hidden) for m in (student, teacher)]
    counts = [len(m) if isinstance(m, (nn.ModuleList, nn.Sequential)) else 0 for m in lists]
    if 0 in counts or counts[0] > counts[1]:
        raise UsageProblem("DT204", "hidden must name a list of blocks of which the teacher has at least as many "
                           f"(got {hidden!r}: {counts[0]} of the student, {counts[1]} of the teacher)")  # fmt: skip
    return {f"{hidden}.{i}": f"{hidden}.{j}" for i, j in enumerate(uniform_map(counts[0], counts[1]))}


def _width(module: nn.Module, name: str) -> int | None:
    """The last size of a layer's output as its last linear layer has it; None where it has none."""
    widths = [layer.out_features for layer in module.get_submodule(name).modules() if isinstance(layer, nn.Linear)]
    return widths[-1] if widths else None


def _check_heads(given: Tensor, wanted: Tensor, name: str, heads: int) -> None:
    if given.ndim != 3 or given.shape[-1] % heads or wanted.shape[-1] % heads:
        raise UsageProblem("DT204", f"relations need outputs [batch, tokens, width] that relation_heads divides (got "
                           f"{list(given.shape)} and {list(wanted.shape)} at {name!r}, {heads} heads)")  # fmt: skip

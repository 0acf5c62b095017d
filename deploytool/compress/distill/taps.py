"""What comes out of inner layers while a model runs."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn

from deploytool.errors import UsageProblem, nearest


class Taps:
    """Keeps the newest output of each named layer; of a tuple, its first tensor. A context manager."""

    def __init__(self, module: nn.Module, names: Iterable[str], whose: str):
        layers = dict(module.named_modules())
        unknown = [name for name in names if name not in layers]
        if unknown:
            raise UsageProblem("DT204", f"layers must be those of the {whose} (got {', '.join(unknown)})",
                               detail=[nearest(name, layers) for name in unknown])  # fmt: skip
        self.outputs: dict[str, Tensor] = {}
        self._handles = [layers[name].register_forward_hook(self._keeper(name)) for name in names]

    def _keeper(self, name: str) -> Any:
        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            self.outputs[name] = output if isinstance(output, Tensor) else output[0]

        return keep

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self.outputs = {}

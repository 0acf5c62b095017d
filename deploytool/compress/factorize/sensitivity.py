"""How much the model's outputs change when one layer is changed: what a budget for all layers is spread by."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from deploytool.compress.calls import plain_forward
from deploytool.source import Source

Sample = dict[str, Tensor]
_SAMPLES = 4


class OutputChange:
    """Compares the floating-point outputs of a source with what its module, changed for a moment, gives."""

    def __init__(self, source: Source, samples: Sequence[Sample]):
        self.source = source
        self.samples = samples[:: max(1, len(samples) // _SAMPLES)][:_SAMPLES]
        self.before = self._run()

    def with_weight(self, layer: nn.Linear, weight: Tensor) -> float:
        """Sum over the outputs of |o' - o|^2 / |o|^2 when the layer has `weight` [m, n] for this one run."""
        own = layer.weight
        layer.weight = nn.Parameter(weight.to(own.dtype), requires_grad=False)
        try:
            after = self._run()
        finally:
            layer.weight = own
        return sum(float((a - b).square().sum() / b.square().sum().clamp(min=1e-30))
                   for a, b in zip(after, self.before, strict=True))  # fmt: skip

    def _run(self) -> list[Tensor]:
        names = self.source.signature.input_names
        with plain_forward():
            outputs = [self.source.flat(*(sample[n] for n in names)) for sample in self.samples]
        return [tensor.double() for tensors in outputs for tensor in tensors if tensor.is_floating_point()]

"""SmoothQuant: the range of activations moves into the weights, so that both fit eight bits.

A few channels of a transformer's activations are far larger than the others and take all of a tensor's range. They are
divided by s, and the weights that read them multiplied by it; s goes into the norm or linear layer that makes the
activations. The function stays the same and no weight is rounded: the target's quantizer does that.

Source: Xiao et al., "SmoothQuant: Accurate and efficient post-training quantization for large language models",
ICML 2023 (arXiv 2211.10438), equations 3 and 4.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, walk_blocks
from deploytool.compress.calls import replay
from deploytool.compress.matrices import matrix_layers
from deploytool.compress.quantize.folding import Folder
from deploytool.compress.quantize.layers import refuse_none
from deploytool.compress.quantize.producers import Link
from deploytool.compress.quantize.tables import SmoothQuant
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.load.surgery import shell, with_module
from deploytool.source import Source

_LEAST = 1e-5  # a channel that is always zero has no range to move


def smoothing(activations: Tensor, weights: Tensor, channels: Tensor, alpha: float) -> Tensor:
    """s = max|x|^alpha / max|w|^(1 - alpha), [n], from the largest sizes per channel [n] of activations and weights.

    `channels` [n]: channels with one number get one factor, from the largest of all of them.
    """
    most_x, most_w = (_class_max(sizes, channels).clamp(min=_LEAST) for sizes in (activations, weights))
    return most_x**alpha / most_w ** (1 - alpha)


def apply(source: Source, settings: SmoothQuant, context: Context) -> tuple[Source, dict[str, Any]]:
    """Smooth the inputs of the chosen linear layers of a copy."""
    work = with_module(source, shell(source.module))
    found, skipped = matrix_layers(work.module)
    linears = {name: layer for name, layer in found.items() if isinstance(layer, nn.Linear)}
    chosen = select(linears, settings.include, settings.exclude)
    folder = Folder()
    layers: list[dict[str, Any]] = []
    for block in walk_blocks(work, chosen, context.samples(source)):
        layers += _smooth(block, settings.alpha, folder)
        context.progress(f"smoothquant: {block.name or 'the model'} ({len(layers)} of {len(chosen)} layers)")
    skipped += folder.reasons
    refuse_none("smoothquant", layers, skipped)
    return work, {"layers": layers, "skipped": skipped}


def _smooth(block: Block, alpha: float, folder: Folder) -> list[dict[str, Any]]:
    largest = _largest_inputs(block)
    told: dict[str, dict[str, Any]] = {}

    def factors(link: Link, readers: list[str]) -> Tensor | None:
        if not any(name in largest for name in readers):
            return None
        layers = [block.module.get_submodule(name) for name in link.readers]
        weights = torch.stack([layer.get_parameter("weight").abs().amax(0) for layer in layers]).amax(0)
        before = next(largest[name] for name in readers if name in largest)
        scale = smoothing(before, weights, link.channels, alpha)
        peaks = {"peak_before": _peak(before), "peak_after": _peak(before / scale), "producer": link.producer}
        told.update(dict.fromkeys(readers, peaks))
        return scale

    done = folder.fold(block, factors)
    return [{"layer": name, **told[name]} for name in done]


def _peak(sizes: Tensor) -> float:
    """How many times the largest channel is the median one: what smoothing makes smaller."""
    return float(sizes.max() / sizes.median().clamp(min=_LEAST))


def _class_max(sizes: Tensor, channels: Tensor) -> Tensor:
    most = torch.zeros(int(channels.max()) + 1, dtype=sizes.dtype)
    return most.scatter_reduce(0, channels, sizes, "amax", include_self=False)[channels]


def _largest_inputs(block: Block) -> dict[str, Tensor]:
    """{layer: max |x| of every input channel [in] over all calls}; layers that never ran are left out."""
    largest: dict[str, Tensor] = {}

    def look(name: str, x: Tensor) -> None:
        size = x.detach().reshape(-1, x.shape[-1]).abs().amax(0)
        largest[name] = torch.maximum(largest[name], size) if name in largest else size

    handles = [layer.register_forward_pre_hook(lambda m, args, n=name: look(n, args[0]))
               for name, layer in block.layers.items()]  # fmt: skip
    try:
        for call in block.calls:
            replay(block.module, call)
    finally:
        for handle in handles:
            handle.remove()
    return largest

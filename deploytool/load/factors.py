"""The layers that a factored convolution or embedding becomes; their weights are not set yet."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

Conv = nn.Conv1d | nn.Conv2d


def tucker_layers(old: nn.Module, inputs: int, outputs: int) -> nn.Sequential:
    """Conv(c, d, k) as Conv(c, inputs, 1), Conv(inputs, outputs, k), Conv(outputs, d, 1).

    Stride, padding and dilation are the middle one's: a kernel of 1 without bias commutes with every kind of padding.
    ValueError for other layers and for ranks above the layer's channels.
    """
    if type(old) not in (nn.Conv1d, nn.Conv2d) or not isinstance(old, (nn.Conv1d, nn.Conv2d)) or old.groups != 1:
        raise ValueError(f"a {type(old).__name__} must be a convolution in one group")
    if not (0 < inputs <= old.in_channels and 0 < outputs <= old.out_channels):
        raise ValueError(f"ranks must be 1 to {old.in_channels} and {old.out_channels}, not {inputs} and {outputs}")
    kind: Any = type(old)
    made: dict[str, Any] = {"device": "meta", "dtype": old.weight.dtype}
    layers = nn.Sequential(
        kind(old.in_channels, inputs, 1, bias=False, **made),
        kind(inputs, outputs, old.kernel_size, stride=old.stride, padding=old.padding, dilation=old.dilation,
             padding_mode=old.padding_mode, bias=False, **made),
        kind(outputs, old.out_channels, 1, bias=old.bias is not None, **made),
    )  # fmt: skip
    return layers.to_empty(device=old.weight.device).requires_grad_(False)


def embedding_pair(old: nn.Module, rank: int) -> nn.Sequential:
    """Embedding(n, d) as Embedding(n, rank), Linear(rank, d, no bias); ValueError for other layers and larger ranks."""
    if type(old) is not nn.Embedding or not isinstance(old, nn.Embedding):
        raise ValueError(f"a {type(old).__name__} must be an nn.Embedding")
    if not 0 < rank <= min(old.weight.shape):
        raise ValueError(f"the rank must be 1 to {min(old.weight.shape)}, not {rank}")
    if old.max_norm is not None:
        raise ValueError("an nn.Embedding with max_norm rescales its rows and has no such form")
    made: dict[str, Any] = {"device": "meta", "dtype": old.weight.dtype}
    rows = nn.Embedding(old.num_embeddings, rank, padding_idx=old.padding_idx, **made)
    pair = nn.Sequential(rows, nn.Linear(rank, old.embedding_dim, bias=False, **made))
    return pair.to_empty(device=torch.device(old.weight.device)).requires_grad_(False)

"""Layers of a class of their own that compute what nn.Linear does, such as those of GPT-2, with transposed weights.

They are known by what they do: a weight [in, out] or [out, in], perhaps a bias, nothing else, and x W + b for any x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

_ROWS = 3
_SAME = 1e-5  # of the largest output: another order of additions, in float32


def as_linear(layer: nn.Module) -> nn.Linear | None:
    """An nn.Linear that gives what the layer gives, with weights of its own; None where the layer is something else."""
    own = dict(layer.named_parameters(recurse=False))
    weight, bias = own.pop("weight", None), own.pop("bias", None)
    more = [*own, *layer.buffers(recurse=False), *layer.children()]
    if more or isinstance(layer, (nn.Linear, nn.Embedding, nn.EmbeddingBag)):
        return None
    if weight is None or weight.ndim != 2 or weight.dtype != torch.float32:
        return None
    for turned in (True, False):
        matrix = weight.detach().T if turned else weight.detach()
        if (bias is None or bias.shape == matrix.shape[:1]) and _does(layer, matrix, bias):
            return _made(matrix, bias)
    return None


def _does(layer: nn.Module, matrix: Tensor, bias: Tensor | None) -> bool:
    """Whether the layer gives x W^T + b for random x [1, 3, in], W [out, in]."""
    x = torch.randn(1, _ROWS, matrix.shape[1], generator=torch.Generator().manual_seed(0)).to(matrix.device)
    with torch.no_grad():
        wanted = torch.nn.functional.linear(x, matrix, bias)
        try:
            given = layer(x)
        except Exception:  # whatever a foreign layer raises for inputs that it is not made for
            return False
    same = isinstance(given, Tensor) and given.shape == wanted.shape
    return same and float((given - wanted).abs().max()) <= _SAME * float(wanted.abs().max())


def _made(matrix: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(matrix.shape[1], matrix.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(matrix.clone(memory_format=torch.contiguous_format), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return made

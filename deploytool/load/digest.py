"""A digest by which two loadings of a model are told to have the same weights."""

from __future__ import annotations

import hashlib

from torch import nn

_ELEMENTS = 1024


def weights_digest(module: nn.Module) -> str:
    """SHA-256, hexadecimal, over name, shape, type and the first 1,024 elements of every tensor of the state.

    Cheap on large models, and enough: weights that are drawn anew differ everywhere.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        if not tensor.is_quantized:
            digest.update(tensor.detach().flatten()[:_ELEMENTS].double().numpy().tobytes())
    return digest.hexdigest()

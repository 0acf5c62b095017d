"""What is told of a loaded model's weights: a digest by which two loadings are compared, and their size."""

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


def weight_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers; what is shared counts once."""
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in module.state_dict().values() if not t.is_quantized}  # fmt: skip
    return sum(held.values())

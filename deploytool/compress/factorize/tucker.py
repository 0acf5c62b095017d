"""Tucker-2 of convolutions: a kernel [d, c, ...] becomes 1x1, core, 1x1 with fewer channels in the middle.

    K[o, i, ...] = sum over p, q of U_out[o, p] core[p, q, ...] U_in[i, q]

Source: Kim et al., "Compression of deep convolutional neural networks for fast and low power mobile applications", ICLR
2016, equation 5; the factors by higher-order orthogonal iteration (De Lathauwer, De Moor, Vandewalle, "On the best
rank-1 and rank-(R1, ..., RN) approximation of higher-order tensors", SIAM J. Matrix Anal. Appl. 2000, algorithm 4.2).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.factorize.ranks import rank_for_energy
from deploytool.compress.factorize.tables import Tucker
from deploytool.compress.select import select, shared_names
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.load.factors import tucker_layers
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source

_ROUNDS = 5


def tucker2(kernel: Tensor, inputs: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    """U_in [c, inputs], core [outputs, inputs, ...] and U_out [d, outputs] of a kernel [d, c, ...]; U orthonormal.

    Starts from the truncated singular vectors of both unfoldings and improves each given the other.
    """
    into = _leading(kernel.transpose(0, 1), inputs)
    out = _leading(kernel, outputs)
    for _ in range(_ROUNDS):
        out = _leading(_times(kernel, into, 1), outputs)
        into = _leading(_times(kernel, out, 0).transpose(0, 1), inputs)
    return into, _times(_times(kernel, into, 1), out, 0), out


def ranks_for_keep(kernel: Tensor, keep: float) -> tuple[int, int]:
    """(inputs, outputs), both the same share of the channels, whose layers have at most `keep` of the weights."""
    d, c = kernel.shape[:2]
    low, high = 0.0, 1.0
    for _ in range(40):
        share = (low + high) / 2
        if _weights(kernel, *_share(c, d, share)) > keep * kernel.numel():
            high = share
        else:
            low = share
    return _share(c, d, low)


def ranks_for_energy(kernel: Tensor, energy: float) -> tuple[int, int]:
    """(inputs, outputs): the smallest that hold `energy` of the squares of each unfolding's singular values."""
    spectra = (torch.linalg.svdvals(unfolded.flatten(1)) for unfolded in (kernel.transpose(0, 1), kernel))
    into, out = (rank_for_energy(s, energy) for s in spectra)
    return into, out


def apply(source: Source, settings: Tucker, context: Context) -> tuple[Source, dict[str, Any]]:
    """Factor the chosen convolutions of a copy, where that saves weights."""
    changed = with_module(source, shell(source.module))
    found = {n: m for n, m in changed.module.named_modules() if isinstance(m, nn.modules.conv._ConvNd)}
    if not found:
        raise UsageProblem("DT204", "tucker must find convolutions in the model (got none)",
                           fix="use svd for linear layers")  # fmt: skip
    chosen = select(found, settings.include, settings.exclude)
    shared = shared_names(changed.module)
    layers, skipped, edits = [], [], []
    masks = dict(source.masks)
    for name, layer in found.items():
        reason = _why_not(name, layer, shared) if name in chosen else "not chosen by include and exclude"
        kernel = layer.weight.detach().double()
        inputs, outputs = (0, 0) if reason else _ranks(kernel, settings)
        if not reason and _weights(kernel, inputs, outputs) >= kernel.numel():
            reason = "factors of these ranks would not save weights"
        if reason:
            skipped.append({"layer": name, "reason": reason})
            continue
        layers.append({"layer": name, **_put(changed.module, name, layer, inputs, outputs),
                       "zeros_lost": masks.pop(f"{name}.weight", None) is not None})  # fmt: skip
        edits.append({"kind": "conv_tucker", "layer": name, "inputs": inputs, "outputs": outputs})
        context.progress(f"tucker: {name} has ranks {inputs} and {outputs}")
    report = {"layers": layers, "skipped": skipped}
    return with_module(changed, changed.module, edits=(*source.edits, *edits), masks=masks), report


def _why_not(name: str, layer: nn.modules.conv._ConvNd, shared: dict[str, str]) -> str | None:
    if not name:
        return "it is the whole model"
    if type(layer) not in (nn.Conv1d, nn.Conv2d):
        return f"a {type(layer).__name__}, not a plain Conv1d or Conv2d"
    if layer.groups != 1:
        return f"a convolution in {layer.groups} groups"
    if all(size == 1 for size in layer.kernel_size):
        return "a kernel of 1 has nothing to take apart"
    if f"{name}.weight" in shared:
        return f"its weight is shared with {shared[f'{name}.weight']}"
    return None


def _ranks(kernel: Tensor, settings: Tucker) -> tuple[int, int]:
    if settings.energy is not None:
        return ranks_for_energy(kernel, settings.energy)
    return ranks_for_keep(kernel, settings.keep or 0.5)


def _put(module: nn.Module, name: str, layer: nn.modules.conv._ConvNd, inputs: int, outputs: int) -> dict[str, Any]:
    kernel = layer.weight.detach().double()
    into, core, out = tucker2(kernel, inputs, outputs)
    ones = (1,) * (kernel.ndim - 2)
    made = tucker_layers(layer, inputs, outputs)
    made.load_state_dict({"0.weight": into.T.reshape(inputs, -1, *ones), "1.weight": core,
                          "2.weight": out.reshape(-1, outputs, *ones),
                          **({} if layer.bias is None else {"2.bias": layer.bias})})  # fmt: skip
    replace_layer(module, name, made)
    total = float(kernel.square().sum())
    return {"ranks": [inputs, outputs], "energy": float(core.square().sum()) / total if total else 1.0,
            "parameters_before": kernel.numel(), "parameters_after": _weights(kernel, inputs, outputs)}  # fmt: skip


def _leading(unfolded: Tensor, rank: int) -> Tensor:
    """The first `rank` left singular vectors of a tensor unfolded along its first axis."""
    u: Tensor = torch.linalg.svd(unfolded.flatten(1), full_matrices=False).U
    if u.shape[1] < rank:  # fewer columns than rows: the rest of a basis, which the core has no part in
        u = torch.linalg.qr(torch.cat([u, torch.eye(len(u), dtype=u.dtype)], dim=1)).Q
    return u[:, :rank]


def _times(kernel: Tensor, factor: Tensor, axis: int) -> Tensor:
    """The kernel with `axis` projected on the factor's columns."""
    projected: Tensor = torch.tensordot(kernel.movedim(axis, -1), factor, dims=1)
    return projected.movedim(-1, axis)


def _share(c: int, d: int, share: float) -> tuple[int, int]:
    return max(1, int(share * c)), max(1, int(share * d))


def _weights(kernel: Tensor, inputs: int, outputs: int) -> int:
    d, c = kernel.shape[:2]
    return c * inputs + inputs * outputs * kernel[0, 0].numel() + outputs * d

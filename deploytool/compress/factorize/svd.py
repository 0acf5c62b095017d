"""Low-rank factorization of linear layers: W [m, n] becomes B [m, r] times A [r, n].

The product is the nearest matrix of rank r in the Frobenius norm (Eckart and Young, "The approximation of one matrix by
another of lower rank", Psychometrika 1936). Both factors are plain nn.Linear: every lowering and quantizer takes them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.factorize.tables import Svd
from deploytool.compress.select import select, shared_names
from deploytool.compress.step import Context
from deploytool.errors import BackendFailed
from deploytool.load.surgery import replace_linear_by_pair, with_module
from deploytool.source import Source

# Their forward reads `child.weight` itself, so the child must stay a Linear.
_READ_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def balanced_factors(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = sqrt(S) Vh [rank, n] and B = U sqrt(S) [m, rank] from U [m, k], s [k], Vh [k, n].

    The root of the singular values on either side gives both factors the same scale, which quantizers like.
    """
    root = s[:rank].sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def rank_for_energy(s: Tensor, energy: float) -> int:
    """The smallest rank whose singular values s [k] (descending) hold `energy` of the sum of their squares."""
    share = s.double().square().cumsum(0)
    return min(int((share < energy * share[-1]).sum()) + 1, len(s))


def rank_for_keep(rows: int, columns: int, keep: float) -> int:
    """The largest rank r with r (rows + columns) <= keep rows columns; at least 1."""
    return max(1, int(keep * rows * columns / (rows + columns)))


def apply(source: Source, settings: Svd, context: Context) -> tuple[Source, dict[str, Any]]:
    """Factor the chosen linear layers of a copy, where that saves weights."""
    module = copy.deepcopy(source.module)
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    chosen = select(linears, settings.include, settings.exclude)
    shared = shared_names(module)
    layers, skipped, edits = [], [], []
    masks = dict(source.masks)
    for name, layer in linears.items():
        reason = _why_not(module, name, layer, shared) if name in chosen else "not chosen by include and exclude"
        done = None if reason else _factor(module, name, layer, settings)
        if done is None:
            skipped.append({"layer": name, "reason": reason or "a smaller pair of this rank would not save weights"})
            continue
        edits.append({"kind": "linear_pair", "layer": name, "rank": done["rank"]})
        done["zeros_lost"] = masks.pop(f"{name}.weight", None) is not None  # a product of factors is dense
        layers.append(done)
        context.progress(f"svd: {name} has rank {done['rank']}")
    changed = with_module(source, module, edits=(*source.edits, *edits), masks=masks)
    return changed, {"layers": layers, "skipped": skipped}


def _why_not(module: nn.Module, name: str, layer: nn.Linear, shared: dict[str, str]) -> str | None:
    parent = module.get_submodule(name.rpartition(".")[0])
    if not name:
        return "it is the whole model"
    if f"{name}.weight" in shared:
        return f"its weight is shared with {shared[f'{name}.weight']}"
    if isinstance(parent, _READ_CHILDREN):
        return f"{type(parent).__name__} reads its weight directly"
    if type(layer) is not nn.Linear:
        return f"a {type(layer).__name__}, not a plain Linear"
    return None


def _factor(module: nn.Module, name: str, layer: nn.Linear, settings: Svd) -> dict[str, Any] | None:
    """Replace one layer; None when the pair would be no smaller."""
    rows, columns = layer.weight.shape
    try:
        u, s, vh = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
    except RuntimeError as error:
        raise BackendFailed("DT504", f"the singular values of {name!r} must converge (got: {error})") from error
    if settings.energy is not None:
        rank = rank_for_energy(s, settings.energy)
    elif settings.keep is not None:
        rank = rank_for_keep(rows, columns, settings.keep)
    else:
        rank = settings.rank or 1
    if rank * (rows + columns) >= rows * columns:
        return None
    first, second = balanced_factors(u, s, vh, rank)
    pair = replace_linear_by_pair(module, name, rank)
    state = {"0.weight": first, "1.weight": second, **({} if layer.bias is None else {"1.bias": layer.bias})}
    pair.load_state_dict(state)
    total = float(s.square().sum())
    return {
        "layer": name, "rank": rank, "energy": float(s[:rank].square().sum()) / total if total else 1.0,
        "parameters_before": rows * columns, "parameters_after": rank * (rows + columns),
    }  # fmt: skip

"""Magnitude pruning: the weights nearest to zero become zero, anywhere or N of every M.

Source: Han, Pool, Tran, Dally, "Learning both weights and connections for efficient neural networks", NeurIPS 2015.
Layers keep their shapes: the model gets smaller when packed, not faster.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.prune.pattern import check_widths, keep_but_smallest, keep_of_groups, not_chosen, zeros_report
from deploytool.compress.prune.tables import Magnitude
from deploytool.compress.select import select, shared_names
from deploytool.compress.step import Context
from deploytool.load.surgery import with_module
from deploytool.source import Source


def keep_mask(weight: Tensor, zeros: int) -> Tensor:
    """Bool mask of the weight's shape, False for exactly `zeros` elements: those of smallest magnitude."""
    return keep_but_smallest(weight.detach().abs(), zeros)


def keep_masks(weights: Sequence[Tensor], sparsity: float, scope: str) -> list[Tensor]:
    """A mask per weight with round(sparsity * n) zeros: n of each weight ("tensor") or of all together ("global")."""
    if scope == "tensor":
        return [keep_mask(w, round(sparsity * w.numel())) for w in weights]
    joined = torch.cat([w.detach().abs().flatten().float() for w in weights])
    parts = torch.split(keep_mask(joined, round(sparsity * joined.numel())), [w.numel() for w in weights])
    return [part.view(w.shape) for part, w in zip(parts, weights, strict=True)]


def apply(source: Source, settings: Magnitude, context: Context) -> tuple[Source, dict[str, Any]]:
    """Prune the chosen layers of a copy; the masks travel with the source, so that later training keeps the zeros."""
    module = copy.deepcopy(source.module)
    candidates, skipped = _candidates(module)
    chosen = select(dict.fromkeys(layer for layer, _ in candidates.values()), settings.include, settings.exclude)
    picked = {name: weight for name, (layer, weight) in candidates.items() if layer in chosen}
    skipped += not_chosen(dict.fromkeys(layer for layer, _ in candidates.values()), chosen)
    masks = dict(source.masks)
    layers = []
    for (name, weight), mask in zip(picked.items(), _masks(picked, settings), strict=True):
        masks[name] = mask & masks[name] if name in masks else mask
        with torch.no_grad():
            weight.masked_fill_(~masks[name], 0.0)
        layers.append(zeros_report(name, weight))
    context.progress(f"magnitude: {len(layers)} weights pruned")
    return with_module(source, module, masks=masks), {"layers": layers, "skipped": skipped}


def _masks(weights: dict[str, nn.Parameter], settings: Magnitude) -> list[Tensor]:
    """A mask per weight, by share or by pattern; rows are what one output is computed from."""
    kept_of = settings.kept_of
    if kept_of is None:
        return keep_masks(list(weights.values()), settings.share, settings.scope)
    check_widths({name: w[0].numel() for name, w in weights.items()}, kept_of)
    return [keep_of_groups(w.detach().abs().flatten(1), *kept_of).view(w.shape) for w in weights.values()]


def _candidates(module: nn.Module) -> tuple[dict[str, tuple[str, nn.Parameter]], list[dict[str, str]]]:
    """{parameter: (its layer, the tensor)} for weight matrices and kernels, and the layers left alone with reasons."""
    shared = shared_names(module)
    embeddings = {n for n, m in module.named_modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    found: dict[str, tuple[str, nn.Parameter]] = {}
    skipped = []
    for layer, owner in module.named_modules():
        own = dict(owner.named_parameters(prefix=layer, recurse=False))
        weights = {n: p for n, p in own.items() if "weight" in n.rpartition(".")[2] and p.ndim >= 2}
        weights = {n: p for n, p in weights.items() if p.is_floating_point()}
        tied = next((shared[n] for n in weights if n in shared and shared[n].rpartition(".")[0] in embeddings), None)
        if layer in embeddings:
            skipped.append({"layer": layer, "reason": "an embedding"})
        elif tied:
            skipped.append({"layer": layer, "reason": f"shares its weight with the embedding {tied}"})
        elif weights:
            found.update({n: (layer, p) for n, p in weights.items()})
        elif own:
            skipped.append({"layer": layer, "reason": f"no weight matrix in {type(owner).__name__}"})
    return found, skipped

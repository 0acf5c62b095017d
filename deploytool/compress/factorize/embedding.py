"""Low-rank embeddings: a table [n, d] becomes a thinner table [n, r] and one linear layer [d, r] for all rows.

Source: Lan et al., "ALBERT: a lite BERT", ICLR 2020, section 3.1; here from a trained table by its singular values.
Rows count by how often the samples hold them, so that the rank goes to what is used (Chen et al., "GroupReduce:
block-wise low-rank approximation for neural language model shrinking", NeurIPS 2018, equation 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import check_samples
from deploytool.compress.calls import plain_forward
from deploytool.compress.factorize.ranks import largest_saving_rank, rank_for_energy, rank_for_keep
from deploytool.compress.factorize.tables import LowRankEmbedding
from deploytool.compress.select import select, shared_names
from deploytool.compress.step import Context
from deploytool.errors import UsageProblem
from deploytool.load.factors import embedding_pair
from deploytool.load.surgery import replace_layer, shell, with_module
from deploytool.source import Source


def weighted_factors(table: Tensor, counts: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [n, rank], the linear layer's weight [d, rank], and all singular values of the weighted table.

    The product is nearest to `table` [n, d] where row i counts `counts` [n] times; rare rows keep what the directions
    of the others leave of them. The columns of the weight are orthonormal.
    """
    _, s, vh = torch.linalg.svd(table * counts.sqrt()[:, None], full_matrices=False)
    return table @ vh[:rank].T, vh[:rank].T, s


def apply(source: Source, settings: LowRankEmbedding, context: Context) -> tuple[Source, dict[str, Any]]:
    """Factor the chosen embeddings of a copy, where that saves weights."""
    changed = with_module(source, shell(source.module))
    tables = {n: m for n, m in changed.module.named_modules() if isinstance(m, nn.Embedding)}
    if not tables:
        raise UsageProblem("DT204", "low-rank-embedding must find nn.Embedding in the model (got none)")
    chosen = select(tables, settings.include, settings.exclude)
    _refuse_large_rank({n: tables[n] for n in chosen}, settings)
    shared = shared_names(changed.module)
    samples = context.samples(source)
    check_samples(samples)
    counts = _counts(source, [n for n in tables if n in chosen], samples)
    layers, skipped, edits = [], [], []
    masks = dict(source.masks)
    for name, layer in tables.items():
        reason = _why_not(name, layer, shared) if name in chosen else "not chosen by include and exclude"
        done = None if reason else _put(changed.module, name, layer, counts[name], settings)
        if done is None:
            skipped.append({"layer": name, "reason": reason or "a smaller pair of this rank would not save weights"})
            continue
        layers.append({**done, "zeros_lost": masks.pop(f"{name}.weight", None) is not None})
        edits.append({"kind": "embedding_pair", "layer": name, "rank": done["rank"]})
        context.progress(f"low-rank-embedding: {name} has rank {done['rank']}")
    report = {"layers": layers, "skipped": skipped}
    return with_module(changed, changed.module, edits=(*source.edits, *edits), masks=masks), report


def _refuse_large_rank(tables: dict[str, nn.Embedding], settings: LowRankEmbedding) -> None:
    widest = max(min(layer.weight.shape) for layer in tables.values())
    if settings.rank is not None and settings.rank > widest:
        raise UsageProblem("DT204", f"rank must be at most the smaller side of a chosen embedding (got "
                           f"{settings.rank}, and none has more than {widest})")  # fmt: skip


def _why_not(name: str, layer: nn.Embedding, shared: dict[str, str]) -> str | None:
    if not name:
        return "it is the whole model"
    if type(layer) is not nn.Embedding or layer.max_norm is not None:
        return "not a plain nn.Embedding"
    if f"{name}.weight" in shared:
        return f"its weight is shared with {shared[f'{name}.weight']}"
    return None


def _counts(source: Source, names: Sequence[str], samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """How often each row is read on the samples, plus one."""
    tables = {name: source.module.get_submodule(name) for name in names}
    found = {name: torch.ones(len(layer.get_parameter("weight")), dtype=torch.float64)
             for name, layer in tables.items()}  # fmt: skip

    def count(name: str, ids: Tensor) -> None:
        found[name] += torch.bincount(ids.flatten(), minlength=len(found[name]))

    handles = [layer.register_forward_pre_hook(lambda m, args, n=name: count(n, args[0]))
               for name, layer in tables.items()]  # fmt: skip
    try:
        with plain_forward():
            for sample in samples:
                source.flat(*(sample[n] for n in source.signature.input_names))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _put(
    module: nn.Module, name: str, layer: nn.Embedding, counts: Tensor, settings: LowRankEmbedding
) -> dict[str, Any] | None:  # fmt: skip
    table = layer.weight.detach().double()
    rows, columns = table.shape
    _, _, s = weighted_factors(table, counts, 1)
    if settings.energy is not None:
        rank = rank_for_energy(s, settings.energy)
    else:
        rank = settings.rank if settings.rank is not None else rank_for_keep(rows, columns, settings.keep or 0.5)
    if rank > largest_saving_rank(rows, columns):
        return None
    thin, weight, _ = weighted_factors(table, counts, rank)
    pair = embedding_pair(layer, rank)
    pair.load_state_dict({"0.weight": thin, "1.weight": weight})
    replace_layer(module, name, pair)
    total = float(s.square().sum())
    return {"layer": name, "rank": rank, "energy": float(s[:rank].square().sum()) / total if total else 1.0,
            "parameters_before": rows * columns, "parameters_after": rank * (rows + columns)}  # fmt: skip

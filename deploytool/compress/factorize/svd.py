"""Low-rank factorization of linear layers: W [m, n] becomes B [m, r] times A [r, n].

Plain, the product is the nearest matrix of rank r in the Frobenius norm (Eckart and Young, "The approximation of one
matrix by another of lower rank", Psychometrika 1936); with `whiten` the one whose outputs are nearest on the
calibration samples (whitening.py). Both factors are plain nn.Linear: every lowering and quantizer takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from deploytool.compress.blocks import Block, Total, check_samples, paired_moments, walk_blocks
from deploytool.compress.factorize.ranks import largest_saving_rank, rank_for_energy, rank_for_keep, spread, tail_energy
from deploytool.compress.factorize.sensitivity import OutputChange
from deploytool.compress.factorize.tables import Svd
from deploytool.compress.factorize.whitening import best_weight, whitened_svd, whitener
from deploytool.compress.matrices import gram, matrix_layers
from deploytool.compress.select import select
from deploytool.compress.step import Context
from deploytool.errors import BackendFailed, InputRefused, UsageProblem
from deploytool.load.surgery import replace_linear_by_pair, shell, with_module
from deploytool.source import Source

Sample = dict[str, Tensor]
_NO_SAVING = "a smaller pair of this rank would not save weights"
_NOT_RUN = "it did not run on the calibration samples"


@dataclass(frozen=True)
class Spectrum:
    """A layer's U [m, k], singular values s [k] and V^T [k, n], the whitening taken back out of V."""

    name: str
    u: Tensor
    s: Tensor
    vh: Tensor

    def weight(self, rank: int) -> Tensor:
        """The matrix [m, n] of that rank."""
        return (self.u[:, :rank] * self.s[:rank]) @ self.vh[:rank]


def balanced_factors(u: Tensor, s: Tensor, vh: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A = Q sqrt(S) Vh [rank, n] and B = U sqrt(S) Q^T [m, rank] from U [m, k], s [k], Vh [k, n].

    For int8: the root of the singular values on either side makes the product of the factors' sizes smallest, and Q, a
    fixed orthogonal matrix, spreads what the strongest directions carry over all entries, so that one scale fits all of
    them (the rotation of Ashkboos et al., "QuaRot", NeurIPS 2024, between two layers with nothing in between).
    """
    root = s[:rank].sqrt()
    turn = _rotation(rank).to(root.dtype)
    return turn @ (root[:, None] * vh[:rank]), (u[:, :rank] * root) @ turn.T


@cache
def _rotation(rank: int) -> Tensor:
    """An orthogonal matrix [rank, rank], the same at every call."""
    drawn = torch.randn(rank, rank, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    found: Tensor = torch.linalg.qr(drawn).Q
    return found


def apply(source: Source, settings: Svd, context: Context) -> tuple[Source, dict[str, Any]]:
    """Factor the chosen linear layers of a copy, where that saves weights."""
    changed = with_module(source, shell(source.module))
    names, skipped = _chosen(source.module, settings)
    samples = context.samples(source) if settings.whiten or settings.budget else []
    if settings.whiten or settings.budget:
        check_samples(samples)
    ranks = _budgeted(source, names, settings, samples, context) if settings.budget else {}
    layers, edits = [], []
    masks = dict(source.masks)
    for number, spectrum in enumerate(_spectra(changed, names, settings, samples, skipped, source), start=1):
        name = spectrum.name
        rows, columns = _linear(changed.module, name).weight.shape
        rank = ranks[name] if settings.budget else _rank(spectrum.s, rows, columns, settings)
        if rank is None or rank > largest_saving_rank(rows, columns):
            skipped.append({"layer": name, "reason": _NO_SAVING if rank else "the budget is better spent elsewhere"})
            continue
        edits.append({"kind": "linear_pair", "layer": name, "rank": rank})
        zeros_lost = masks.pop(f"{name}.weight", None) is not None  # a product of factors is dense
        layers.append({**_put(changed.module, spectrum, rank), "zeros_lost": zeros_lost})
        context.progress(f"svd: {name} has rank {rank} ({number} of {len(names)} layers)")
    report = {"layers": layers, "skipped": skipped, "samples": len(samples)}
    return with_module(changed, changed.module, edits=(*source.edits, *edits), masks=masks), report


def _chosen(module: nn.Module, settings: Svd) -> tuple[list[str], list[dict[str, str]]]:
    """The layers to factor, and the linear ones that are not, with reasons."""
    linears = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    wanted = select(linears, settings.include, settings.exclude)
    found, passed = matrix_layers(module)
    reasons = {row["layer"]: row["reason"] for row in passed}
    if "" in linears:
        reasons[""] = "it is the whole model"
    reasons.update({name: "not chosen by include and exclude" for name in linears if name not in wanted})
    names = [name for name in linears if name not in reasons and name in found]
    widest = max((min(linears[name].weight.shape) for name in names), default=None)
    if widest is not None and settings.rank is not None and settings.rank > widest:
        raise UsageProblem("DT204", f"rank must be at most the smaller side of a chosen layer (got {settings.rank}, "
                           f"and no layer has more than {widest})",
                           fix=f"choose a rank below {widest}, or give keep or budget instead")  # fmt: skip
    return names, [{"layer": name, "reason": reasons[name]} for name in linears if name in reasons]


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _rank(s: Tensor, rows: int, columns: int, settings: Svd) -> int:
    if settings.energy is not None:
        return rank_for_energy(s, settings.energy)
    if settings.keep is not None:
        return rank_for_keep(rows, columns, settings.keep)
    return settings.rank or 1


def _budgeted(
    source: Source, names: Sequence[str], settings: Svd, samples: Sequence[Sample], context: Context
) -> dict[str, int | None]:
    """Ranks for all layers out of one budget.

    What a layer loses at a rank is its own loss, scaled so that it says how much the model's outputs change: that is
    measured once, at the rank which the same share for every layer would give.
    """
    share = settings.budget or 0.0
    changed = OutputChange(source, samples)
    found: list[str] = []
    losses, shapes = [], []
    for spectrum in _spectra(source, names, settings.model_copy(update={"reconstruct": False}), samples, []):
        layer = _linear(source.module, spectrum.name)
        rows, columns = layer.weight.shape
        rank = min(rank_for_keep(rows, columns, share), len(spectrum.s))
        loss = tail_energy(spectrum.s)
        effect = changed.with_weight(layer, spectrum.weight(rank))
        context.progress(f"svd: {spectrum.name} at rank {rank} changes the outputs by {effect:.3g} "
                         f"({len(found) + 1} of {len(names)} layers measured)")  # fmt: skip
        found.append(spectrum.name)
        losses.append(loss * (effect / max(float(loss[rank]), 1e-30)))
        shapes.append((rows, columns))
    if not found:
        return {}
    budget = int(share * sum(rows * columns for rows, columns in shapes))
    return dict(zip(found, spread(losses, shapes, budget), strict=True))


def _spectra(
    source: Source, names: Sequence[str], settings: Svd, samples: Sequence[Sample], skipped: list[dict[str, str]],
    original: Source | None = None,
) -> Iterator[Spectrum]:  # fmt: skip
    """Every layer's spectrum in turn; the caller may factor it before the next, whose inputs then are the new ones.

    `original` is what `reconstruct` works towards. Layers that never ran are added to `skipped`.
    """
    if not settings.whiten:
        for name in names:
            yield _spectrum(name, _linear(source.module, name).weight.detach().double(), None)
        return
    before: Iterator[Block | None] = iter(lambda: None, 0)
    if settings.reconstruct and original is not None:
        before = walk_blocks(with_module(original, shell(original.module)), names, samples)
    seen = set()
    for block, reference in zip(walk_blocks(source, names, samples), before, strict=False):
        totals = block.accumulate(gram)
        for group in _groups(totals):
            inputs, cross = totals[group[0]].sum, None
            if reference is not None:  # what the layers before it in its block have become is to be made good too
                pair = paired_moments(reference, block, group[:1])[group[0]]
                inputs, cross = pair.gram, pair.cross
            s = _whitener(group[0], inputs, settings)
            for name in group:
                seen.add(name)
                weight = _linear(source.module, name).weight.detach().double()
                if cross is not None:
                    weight = best_weight(weight, cross, inputs, settings.damping)
                yield _spectrum(name, weight, s)
    skipped += [{"layer": name, "reason": _NOT_RUN} for name in names if name not in seen]


def _groups(totals: dict[str, Total]) -> list[list[str]]:
    """The layers in the order in which they run; those that read the same tensor together."""
    groups: dict[int, list[str]] = {}
    for name, total in totals.items():
        groups.setdefault(id(total), []).append(name)
    return list(groups.values())


def _whitener(name: str, total: Tensor, settings: Svd) -> Tensor:
    try:
        return whitener(total, settings.damping)
    except ValueError as error:
        raise InputRefused("DT303", f"calibration must reach {name!r} with inputs that differ (got: {error})",
                           fix="give more samples, or exclude the layer") from error  # fmt: skip


def _spectrum(name: str, weight: Tensor, s: Tensor | None) -> Spectrum:
    try:
        if s is None:
            return Spectrum(name, *torch.linalg.svd(weight, full_matrices=False))
        return Spectrum(name, *whitened_svd(weight, s))
    except RuntimeError as error:
        raise BackendFailed("DT504", f"the singular values of {name!r} must converge (got: {error})") from error


def _put(module: nn.Module, spectrum: Spectrum, rank: int) -> dict[str, Any]:
    """Replace one layer by its factors."""
    layer = _linear(module, spectrum.name)
    rows, columns = layer.weight.shape
    first, second = balanced_factors(spectrum.u, spectrum.s, spectrum.vh, rank)
    pair = replace_linear_by_pair(module, spectrum.name, rank)
    pair.load_state_dict({"0.weight": first, "1.weight": second,
                          **({} if layer.bias is None else {"1.bias": layer.bias})})  # fmt: skip
    total = float(spectrum.s.square().sum())
    return {
        "layer": spectrum.name, "rank": rank,
        "energy": float(spectrum.s[:rank].square().sum()) / total if total else 1.0,
        "parameters_before": rows * columns, "parameters_after": rank * (rows + columns),
    }  # fmt: skip

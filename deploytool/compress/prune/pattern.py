"""Which weights are kept, by their scores: a share of all, of every row, or N of every M neighbours in a row.

N:M: Mishra et al., "Accelerating sparse deep neural networks", 2021 (2:4).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from deploytool.errors import UsageProblem


def keep_but_smallest(score: Tensor, zeros: int) -> Tensor:
    """Bool mask of score's shape, False for exactly `zeros` elements: the smallest scores.

    Of equal scores those that come first in memory order go first, so the mask is a function of the values alone.
    """
    keep = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    if zeros > 0:
        flat = score.flatten()
        threshold = flat.kthvalue(zeros).values
        keep[flat < threshold] = False
        equal = (flat == threshold).nonzero().flatten()
        keep[equal[: zeros - int((~keep).sum())]] = False
    return keep.view(score.shape)


def keep_in_rows(score: Tensor, zeros: int) -> Tensor:
    """Bool mask [..., n], False for the `zeros` smallest scores of every row; of equal ones the first go first."""
    order = score.argsort(dim=-1, stable=True)
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order[..., :zeros], False)


def keep_of_groups(score: Tensor, kept: int, group: int) -> Tensor:
    """Bool mask [rows, columns] that keeps the `kept` highest scores of every `group` neighbours in a row."""
    rows, columns = score.shape
    return keep_in_rows(score.reshape(rows, columns // group, group), group - kept).view(rows, columns)


def check_widths(widths: Mapping[str, int], kept_of: tuple[int, int] | None) -> None:
    """Raises UsageProblem when the pattern's M does not divide the row length of one of the layers."""
    if kept_of is None:
        return
    bad = [f"{name}: rows of {width} weights" for name, width in widths.items() if width % kept_of[1]]
    if bad:
        raise UsageProblem("DT204", f"pattern {kept_of[0]}:{kept_of[1]} must divide the row length of every chosen "
                           f"layer (got {len(bad)} that it does not)", detail=bad[:20],
                           fix="exclude these layers, or take another pattern")  # fmt: skip


def zeros_report(name: str, weight: Tensor) -> dict[str, object]:
    """What the report says about one pruned weight."""
    zeros = int((weight == 0).sum())
    return {"layer": name, "elements": weight.numel(), "zeros": zeros, "sparsity": zeros / weight.numel()}


def not_chosen(candidates: Sequence[str] | Mapping[str, object], chosen: set[str]) -> list[dict[str, str]]:
    """The report's lines for the layers that include and exclude left alone."""
    return [{"layer": n, "reason": "not chosen by include and exclude"} for n in candidates if n not in chosen]

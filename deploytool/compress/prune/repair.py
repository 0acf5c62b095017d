"""The best values of the weights that pruning kept, for what the uncompressed model gives.

    W' = argmin ||W X0^T - W' X^T||^2 + l ||W' - W||^2    with W' zero where the mask is False

Every row of the weight is a regression on columns of its own. They are solved together by conjugate gradients on the
kept entries, preconditioned with the diagonal (Hestenes and Stiefel, "Methods of conjugate gradients for solving linear
systems", 1952): one matrix product an iteration, instead of a factorization for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_kept(
    start: Tensor, keep: Tensor, gram: Tensor, wanted: Tensor, *, iterations: int = 12
) -> tuple[Tensor, Tensor]:
    """The weight W' [out, in] with W' G = B on the kept entries, as near as `iterations` steps come, and B - W' G of
    all entries; float32.

    start   [out, in], zero outside `keep`
    gram    G = X^T X + l I [in, in], positive definite
    wanted  B = W (X0^T X + l I) [out, in]
    """
    w, g, mask = start.float().clone(), gram.float(), keep.float()
    scale = g.diagonal().clamp(min=1e-30)
    left = torch.addmm(wanted.float(), w, g, alpha=-1)
    step = torch.zeros_like(w)
    rho = w.new_zeros(len(w), 1)
    for _ in range(iterations):
        scaled = (left / scale).mul_(mask)
        before, rho = rho, _along(left, scaled)
        step.mul_(torch.where(before > 0, rho / before.clamp(min=1e-30), 0.0)).add_(scaled)
        ahead = step @ g
        curvature = _along(step, ahead)
        length = torch.where(curvature > 0, rho / curvature.clamp(min=1e-30), 0.0)
        w.addcmul_(length, step)
        left.addcmul_(length, ahead, value=-1)
    return w, left


def _along(one: Tensor, two: Tensor) -> Tensor:
    """The dot product of every row of the one with the other's, [out, 1]."""
    return (one * two).sum(dim=1, keepdim=True)

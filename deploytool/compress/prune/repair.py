"""The best values of the weights that pruning kept, for what the uncompressed model gives.

    W' = argmin ||W X0^T - W' X^T||^2 + l ||W' - W||^2    with W' zero where the mask is False

Every row of the weight is a regression on columns of its own. They are solved together by conjugate gradients on the
kept entries, preconditioned with the diagonal (Hestenes and Stiefel, "Methods of conjugate gradients for solving linear
systems", 1952): one matrix product an iteration, instead of a factorization for each row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_kept(start: Tensor, keep: Tensor, gram: Tensor, wanted: Tensor, *, iterations: int = 12) -> Tensor:
    """The weight [out, in] with W' G = B on the kept entries, as near as `iterations` steps come; float32.

    start   [out, in], zero outside `keep`
    gram    G = X^T X + l I [in, in], positive definite
    wanted  B = W (X0^T X + l I) [out, in]
    """
    w, g, mask = start.float().clone(), gram.float(), keep.float()
    scale = g.diagonal().clamp(min=1e-30)
    residual = (wanted.float() - w @ g) * mask
    step = residual / scale
    rho = (residual * step).sum(dim=1, keepdim=True)
    for _ in range(iterations):
        ahead = (step @ g) * mask
        curvature = (step * ahead).sum(dim=1, keepdim=True)
        length = torch.where(curvature > 0, rho / curvature.clamp(min=1e-30), torch.zeros_like(rho))
        w += length * step
        residual -= length * ahead
        scaled = residual / scale
        after = (residual * scaled).sum(dim=1, keepdim=True)
        step = scaled + torch.where(rho > 0, after / rho.clamp(min=1e-30), torch.zeros_like(rho)) * step
        rho = after
    return w

"""Truncation that looks at the inputs: the least change of a layer's outputs instead of its weights.

Source: Wang, Zheng, Wan, Zhang, "SVD-LLM: truncation-aware singular value decomposition", ICLR 2025, section 3.1; the
reconstruction is reduced-rank regression (Izenman, Journal of Multivariate Analysis 1975, equation 1.9).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TRIES = 8


def whitener(gram: Tensor, damping: float) -> Tensor:
    """Lower triangular S [n, n] with S S^T = gram + d I, in float64.

    `gram` [n, n] is the sum of x x^T over the inputs x [n]; d is `damping` times the mean of its diagonal, ten times
    more after every failure of Cholesky's method. Raises ValueError when the inputs are all zero or not finite.
    """
    gram = gram.double()
    mean = float(gram.diagonal().mean())
    if not bool(torch.isfinite(gram).all()) or mean <= 0:
        raise ValueError("the inputs of the layer must be finite and not all zero")
    for attempt in range(_TRIES):
        damped = gram + torch.eye(len(gram), dtype=gram.dtype) * (damping * 10**attempt * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            found: Tensor = lower
            return found
    raise ValueError("the Gram matrix of the layer's inputs must be positive definite after damping")


def whitened_svd(weight: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U [m, k], singular values [k] and V^T S^-1 [k, n] of weight [m, n] times S [n, n].

    The squares of the singular values past r sum to what rank r costs: |W X - W_r X|^2 over the inputs X of S.
    """
    u, values, vh = torch.linalg.svd(weight.double() @ s, full_matrices=False)
    return u, values, torch.linalg.solve_triangular(s, vh, upper=False, left=False)


def best_weight(weight: Tensor, cross: Tensor, gram: Tensor, damping: float) -> Tensor:
    """The weight M [m, n] that comes nearest to the outputs W x where the layer now gets x' instead of x.

    cross [n, n] is the sum of x x'^T, gram that of x' x'^T: M = W (cross + d I) (gram + d I)^-1, which is W where
    nothing has changed; d as in `whitener`.
    """
    s = whitener(gram, damping)
    ridge = torch.eye(len(gram), dtype=torch.float64) * (damping * float(gram.double().diagonal().mean()))
    return torch.cholesky_solve((weight.double() @ (cross.double() + ridge)).T, s).T

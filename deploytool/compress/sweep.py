"""Columns of a weight settled one after the other, where those that follow make good for what each has lost.

Settling column j moves the later ones by  -e[j] U[j, j:]  with  e[j] = (w[j] - q[j]) / U[j, j]; U [n, n] is upper
triangular, (X^T X + l I)^-1 = U^T U. Only the next few columns are moved at once; those further on are moved by many
at a time, in one product.

Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ", ICLR 2023 (arXiv 2210.17323), section 3.3, "lazy batch updates".
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_NARROW = 16  # columns that are moved at once; a multiple of it where patterns want more


def sweep(
    columns: Tensor, root: Tensor, settle: Callable[[int, Tensor, Tensor], None], *, width: int, together: int = 1
) -> Tensor:
    """Settle the columns [n, rows] float32 in place, the first first; `root` is U [n, n] float32.

    Returns what it costs, [rows]: the sums of e^2, which are (W - Q) (X^T X + l I) (W - Q)^T.

    settle    gets a column's number, its values [rows], which it changes in place, and where its e [rows] belongs
    width     where a column's number is a multiple of it, that many columns are up to date when it is settled
    together  the same for a few columns
    """
    narrow = -(-_NARROW // together) * together
    lost = columns.new_zeros(columns.shape[1])
    for start in range(0, len(columns), width):
        stop = min(start + width, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for low in range(start, stop, narrow):
            high = min(low + narrow, stop)
            for j in range(low, high):
                error = errors[j - start]
                settle(j, columns[j], error)
                columns[j + 1 : high].addr_(root[j, j + 1 : high], error, alpha=-1)
            done = errors[low - start : high - start]
            columns[high:stop].addmm_(root[low:high, high:stop].T, done, alpha=-1)
        columns[stop:].addmm_(root[start:stop, stop:].T, errors, alpha=-1)
        lost += errors.square_().sum(dim=0)
    return lost

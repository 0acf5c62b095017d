"""Pictures of digits as another hand would write them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from fit import Batch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample


def moved(images: Tensor, generator: torch.Generator, turn: float, zoom: float, shift: float) -> Tensor:
    """Each image turned by up to `turn` rad, scaled by up to the share `zoom`, shifted by up to `shift` half widths."""
    angle, scale, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = turn * angle, 1 + zoom * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, right * shift], dim=1), torch.stack([sin, cos, down * shift], dim=1)]
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def moving(
    batches: Callable[[int], Iterable[Batch]], turn: float, zoom: float, shift: float
) -> Callable[[int], Iterator[Batch]]:
    """The same batches with every image moved a little; the epoch seeds the movements."""

    def moved_batches(epoch: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(epoch)
        for batch in batches(epoch):
            yield {**batch, "image": moved(batch["image"], generator, turn, zoom, shift)}

    return moved_batches

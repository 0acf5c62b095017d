"""Train models/digits.py: `python scripts/train/digits.py`, about a minute on two cores."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from fit import Batch, model_source, train
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

source = model_source("digits")


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image as another hand would write it: turned by up to 0.1 rad, scaled by 5 %, shifted by half a pixel."""
    angle, scale, right, down = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = 0.1 * angle, 1 + 0.05 * scale
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rows = [torch.stack([cos, -sin, right / 8], dim=1), torch.stack([sin, cos, down / 8], dim=1)]
    grid = affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def batches(epoch: int) -> Iterator[Batch]:
    """The training part in the epoch's order, every image moved a little."""
    generator = torch.Generator().manual_seed(epoch)
    for batch in source.train_batches(epoch):
        yield {**batch, "image": moved(batch["image"], generator)}


if __name__ == "__main__":
    train(source, source.DigitTransformer, epochs=60, batches=batches, peak=2e-3)

"""Train models/digits.py: `python scripts/train/digits.py`, about a minute on two cores."""

from __future__ import annotations

from augment import moving
from fit import model_source, train

source = model_source("digits")

if __name__ == "__main__":
    batches = moving(source.train_batches, turn=0.1, zoom=0.05, shift=0.125)  # half a pixel of eight
    train(source, source.DigitTransformer, epochs=60, batches=batches, peak=2e-3)

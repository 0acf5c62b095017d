"""Train models/mnistcnn.py: `python scripts/train/mnistcnn.py`, about a minute on two cores."""

from __future__ import annotations

from augment import moving
from fit import model_source, train

source = model_source("mnistcnn")

if __name__ == "__main__":
    batches = moving(source.train_batches, turn=0.15, zoom=0.08, shift=0.1)  # 1.4 pixels of 28
    train(source, source.DigitNetwork, epochs=15, batches=batches, peak=1e-2)

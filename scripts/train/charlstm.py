"""Train models/charlstm.py: `python scripts/train/charlstm.py`, under two minutes on two cores."""

from __future__ import annotations

from fit import model_source, train

source = model_source("charlstm")

if __name__ == "__main__":
    train(source, source.CharacterModel, epochs=10, batches=source.train_batches, peak=1e-2)

"""Fine-tuning: the model's own loss on its own training data; pruned weights stay zero, quantized ones on grids."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from deploytool.compress.finetune.tables import Finetune
from deploytool.compress.fitting import labelled_batches, outputs_of, seed_of, train
from deploytool.compress.qat.weights import on_grids
from deploytool.compress.step import Context
from deploytool.load.surgery import with_module
from deploytool.source import Source
from deploytool.train.stream import Batch


def apply(source: Source, settings: Finetune, context: Context) -> tuple[Source, dict[str, Any]]:
    """Train a copy; raises InputRefused when the model file has no train_batches() or no loss()."""
    batches, own = labelled_batches(source, "finetune")
    student = with_module(source, copy.deepcopy(source.module))

    def loss(batch: Batch) -> Tensor:
        return own(outputs_of(student.flat, source, batch), batch)

    with on_grids(student.module, source) as grids:
        masks = {grids.name(name): mask for name, mask in source.masks.items()}
        done = train(student.module, batches, loss, settings, context, masks)
        encodings = grids.bake()
    report = {"data": "train_batches", "seed": seed_of(settings, context), **done.report(),
              "masked_weights": len(source.masks), "weights_on_grids": len(encodings), "layers": [],
              "skipped": []}  # fmt: skip
    return with_module(student, student.module, encodings=encodings), report

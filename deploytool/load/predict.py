"""A runner seen from a model's evaluate(): tensors in, tensors out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deploytool.runner import Runner
from deploytool.source import Predict


def tensor_predict(runner: Runner) -> Predict:
    """predict({input name: tensor}) -> {output name: tensor}, computed by `runner`."""

    def predict(feeds: Mapping[str, Any]) -> dict[str, Any]:
        outputs = runner.run({name: torch.as_tensor(value).numpy() for name, value in feeds.items()})
        return {name: torch.from_numpy(array) for name, array in outputs.items()}

    return predict

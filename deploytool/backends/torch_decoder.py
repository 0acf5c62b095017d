"""Decodes one sequence with a torch module: the cache stays in tensors between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deploytool.decoding import PAST, PRESENT, TOKENS
from deploytool.signature import Signature


class TensorCache:
    """What `deploytool.decoding.Loop` does, without copies to NumPy and back."""

    def __init__(self, module: Any, signature: Signature) -> None:
        self._module, self._signature = module, signature
        self._past = {spec.name: torch.zeros([1 if axis == 0 else size if isinstance(size, int) else 0
                                              for axis, size in enumerate(spec.shape)])
                      for spec in signature.inputs if spec.name.startswith(PAST)}  # fmt: skip
        self._length = 0

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores [vocabulary] of the token after `tokens`."""
        start, self._length = self._length, self._length + len(tokens)
        feeds: dict[str, Tensor] = {
            TOKENS: torch.tensor([list(tokens)]),
            "attention_mask": torch.ones(1, self._length, dtype=torch.int64),
            "position_ids": torch.arange(start, self._length)[None],
            **self._past,
        }
        with torch.inference_mode():
            given = self._module(*(feeds[name] for name in self._signature.input_names))
        outputs = dict(zip(self._signature.output_names, given, strict=True))
        self._past = {name: outputs[PRESENT + name.removeprefix(PAST)] for name in self._past}
        scores: np.ndarray = outputs["logits"][0, -1].numpy()
        return scores

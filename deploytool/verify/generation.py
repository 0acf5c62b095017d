"""Greedy decoding with a KV cache on any runner, in NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from deploytool.runner import Runner
from deploytool.signature import TensorSpec

_PAST = "past_key_values."
_PRESENT = "present."


def greedy(runner: Runner, prompt: list[int], new_tokens: int) -> list[int]:
    """The `new_tokens` most likely next tokens, one after the other; batch 1.

    The runner takes input_ids [1, sequence], attention_mask [1, past + sequence], optionally position_ids
    [1, sequence] and past_key_values.N.key/value, and gives logits [1, sequence, vocabulary] and present.N.key/value.
    """
    specs = {spec.name: spec for spec in runner.signature.inputs}
    past = {name: _empty(spec) for name, spec in specs.items() if name.startswith(_PAST)}
    ids, length = list(prompt), 0
    tokens: list[int] = []
    while len(tokens) < new_tokens:
        feeds: dict[str, Any] = {
            "input_ids": np.array([ids], dtype=np.int64),
            "attention_mask": np.ones((1, length + len(ids)), dtype=np.int64),
        }
        if "position_ids" in specs:
            feeds["position_ids"] = np.arange(length, length + len(ids), dtype=np.int64)[None]
        outputs = runner.run({**feeds, **past})
        token = int(outputs["logits"][0, -1].argmax())
        tokens.append(token)
        if past:
            past = {name: outputs[_PRESENT + name.removeprefix(_PAST)] for name in past}
            length += len(ids)
            ids = [token]
        else:
            ids.append(token)
    return tokens


def _empty(spec: TensorSpec) -> np.ndarray:
    """A cache of batch 1 and length 0: axis 0 is the batch, the other free axis the past."""
    shape = [1 if axis == 0 else 0 if isinstance(dim, str) else dim for axis, dim in enumerate(spec.shape)]
    return np.zeros(shape, dtype=spec.dtype)

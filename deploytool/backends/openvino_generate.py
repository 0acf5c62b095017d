"""Decodes one sequence with OpenVINO: NumPy and openvino are all that it needs. The cache stays in the engine."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

BEAMS, SCORES = "beam_idx", "logits"


class KeptCache:
    """Decodes one sequence of up to `capacity` tokens with a request of its own, whose variables hold the cache.

    ValueError when the sequence outgrows the capacity.
    """

    def __init__(self, compiled: ov.CompiledModel, capacity: int) -> None:
        self._request = compiled.create_infer_request()
        self._request.reset_state()
        self._inputs = {name for port in compiled.inputs for name in port.get_names()}
        self._scores = compiled.output(SCORES)
        self._capacity, self._length = capacity, 0

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores [vocabulary] of the token after `tokens`."""
        start, length = self._length, self._length + len(tokens)
        if length > self._capacity:
            raise ValueError(f"the sequence must fit the capacity of {self._capacity} tokens (got {length})")
        self._length = length
        feeds: dict[str, Any] = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(start, length, dtype=np.int64)[None],
            BEAMS: np.zeros(1, np.int32),
        }
        outputs = self._request.infer({name: array for name, array in feeds.items() if name in self._inputs},
                                      share_inputs=True, share_outputs=True)  # fmt: skip
        scores: np.ndarray = outputs[self._scores][0, -1].copy()
        return scores


def engine_config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """How a model is compiled, as the settings of its artifact say: in the precision that it is written in.

    deploytool compiles with this too. A bundle's self-test, which is one file, repeats it.
    """
    return {
        "PERFORMANCE_HINT": str(settings.get("hint", "latency")).upper(),
        "INFERENCE_NUM_THREADS": int(settings.get("threads", 0)),
        "INFERENCE_PRECISION_HINT": "f32",  # CPUs with bf16 would compute in it otherwise
        "KV_CACHE_PRECISION": "f32",  # caches are rounded to 8 bits otherwise
    }


def open_decoder(folder: Path, capacity: int) -> KeptCache:
    """The decoder of the artifact in `folder`, with its own settings."""
    artifact = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    config = engine_config(artifact["settings"])
    return KeptCache(ov.Core().compile_model(str(folder / artifact["entry"]), "CPU", config), capacity)

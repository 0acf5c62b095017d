"""Decodes one sequence with ONNX Runtime: NumPy and onnxruntime are all that it needs.

The cache is one buffer per layer that past and present share, where the graph can write in place; else each step's
cache is handed to the next.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

PAST, PRESENT, SCORES = "past_key_values.", "present.", "logits"
LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ERROR = 3  # ONNX Runtime's log level: warnings about unused initializers are not for users


class SharedCache:
    """Decodes one sequence of up to `capacity` tokens; `in_place` where the graph takes past and present as one buffer.

    ValueError when the sequence outgrows the capacity.
    """

    def __init__(self, session: ort.InferenceSession, capacity: int, in_place: bool) -> None:
        self._session, self._capacity, self._in_place = session, capacity, in_place
        self._inputs = {value.name: value for value in session.get_inputs()}
        self._outputs = [value.name for value in session.get_outputs()]
        self._past = {name: self._buffer(value.shape) for name, value in self._inputs.items() if name.startswith(PAST)}
        self._length = 0

    def _buffer(self, shape: Sequence[Any]) -> ort.OrtValue:
        """Batch 1; the other free axis is the length."""
        length = self._capacity if self._in_place else 0
        sizes = [1 if axis == 0 else size if isinstance(size, int) else length for axis, size in enumerate(shape)]
        return ort.OrtValue.ortvalue_from_numpy(np.zeros(sizes, np.float32))

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores [vocabulary] of the token after `tokens`."""
        start, self._length = self._length, self._length + len(tokens)
        if self._length > self._capacity:
            raise ValueError(f"the sequence must fit the capacity of {self._capacity} tokens (got {self._length})")
        binding = self._session.io_binding()
        self._bind(binding, "input_ids", np.array([tokens], np.int64))
        self._bind(binding, "attention_mask", np.ones((1, self._length), np.int64))
        self._bind(binding, "position_ids", np.arange(start, self._length, dtype=np.int64)[None])
        for name, value in self._past.items():
            binding.bind_ortvalue_input(name, value)
            if self._in_place:
                binding.bind_ortvalue_output(PRESENT + name.removeprefix(PAST), value)
        fresh = [SCORES] if self._in_place else self._outputs
        for name in fresh:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        found = dict(zip(fresh, binding.get_outputs()[-len(fresh) :], strict=True))  # in the order of binding
        if not self._in_place:
            self._past = {name: found[PRESENT + name.removeprefix(PAST)] for name in self._past}
        scores: np.ndarray = found[SCORES].numpy()[0, -1]
        return scores

    def _bind(self, binding: Any, name: str, array: np.ndarray) -> None:
        if name in self._inputs:
            binding.bind_cpu_input(name, array)


def session_options(settings: Mapping[str, Any]) -> ort.SessionOptions:
    """The options of a session as the settings of an artifact say; what they leave out takes its default.

    deploytool opens sessions with these too. A bundle's self-test, which is one file, repeats them.
    """
    options = ort.SessionOptions()
    for entry, on in (("intra_op.allow_spinning", settings.get("spinning", True)),
                      ("set_denormal_as_zero", settings.get("flush", False)),
                      ("disable_prepacking", not settings.get("packing", True)),
                      ("disable_quant_qdq", not settings.get("fuse_qdq", True)),
                      # Where int8 products saturate, signed weights become unsigned ones, whose products do not.
                      ("x64quantprecision", True)):  # fmt: skip
        options.add_session_config_entry(f"session.{entry}", str(int(on)))
    options.enable_cpu_mem_arena = bool(settings.get("arena", True))
    options.intra_op_num_threads = int(settings.get("threads", 0))
    options.inter_op_num_threads = 1
    options.graph_optimization_level = LEVELS[str(settings.get("optimization", "all"))]
    options.log_severity_level = _ERROR
    return options


def open_model(folder: Path) -> tuple[ort.InferenceSession, bool]:
    """The session of the artifact in `folder` with its own settings, and whether it writes its cache in place."""
    artifact = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))
    settings = artifact["settings"]
    session = ort.InferenceSession(str(folder / artifact["entry"]), session_options(settings),
                                   providers=["CPUExecutionProvider"],
                                   disabled_optimizers=list(settings.get("without", ())))  # fmt: skip
    return session, settings.get("rows") == "single"


def open_decoder(folder: Path, capacity: int) -> SharedCache:
    """The decoder of the artifact in `folder`, for one sequence of up to `capacity` tokens."""
    session, in_place = open_model(folder)
    return SharedCache(session, capacity, in_place)

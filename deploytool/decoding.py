"""One token after the other: a runner's language model with its cache, in NumPy alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from deploytool.runner import Runner
from deploytool.signature import Signature, TensorSpec

PAST = "past_key_values."
PRESENT = "present."
TOKENS = "input_ids"


class Decoder(Protocol):
    """Holds the cache of one sequence; `step` appends tokens to it and gives the scores of the token after them."""

    def step(self, tokens: Sequence[int]) -> np.ndarray: ...


def decodes(signature: Signature) -> bool:
    """Whether a model with this signature takes and gives the cache of a language model."""
    names = set(signature.input_names)
    return TOKENS in names and any(name.startswith(PAST) for name in names)


def decoder_of(runner: Runner, capacity: int) -> Decoder:
    """A decoder for up to `capacity` tokens: the engine's own where it has one, else a loop over `run`."""
    own = getattr(runner, "decoder", None)
    found: Decoder | None = own(capacity) if own is not None else None
    return found or Loop(runner)


class Loop:
    """Feeds a runner's cache outputs back as inputs; without a cache the whole sequence is fed each time.

    The runner takes input_ids [1, sequence], attention_mask [1, past + sequence], optionally position_ids
    [1, sequence] and past_key_values.N.key/value, and gives logits [1, sequence, vocabulary] and present.N.key/value.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._specs = {spec.name: spec for spec in runner.signature.inputs}
        self._past = {name: _empty(spec) for name, spec in self._specs.items() if name.startswith(PAST)}
        self._tokens: list[int] = []

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        """Scores [vocabulary] of the token after `tokens`."""
        done = len(self._tokens) if self._past else 0
        self._tokens += tokens
        feeds: dict[str, Any] = {
            TOKENS: np.array([self._tokens[done:]], dtype=np.int64),
            "attention_mask": np.ones((1, len(self._tokens)), dtype=np.int64),
        }
        if "position_ids" in self._specs:
            feeds["position_ids"] = np.arange(done, len(self._tokens), dtype=np.int64)[None]
        outputs = self._runner.run({**feeds, **self._past})
        self._past = {name: outputs[PRESENT + name.removeprefix(PAST)] for name in self._past}
        scores: np.ndarray = outputs["logits"][0, -1]
        return scores


def greedy_tokens(decoder: Decoder, prompt: Sequence[int], new_tokens: int) -> list[int]:
    """The `new_tokens` most likely next tokens, one after the other."""
    tokens: list[int] = []
    fed: Sequence[int] = prompt
    while len(tokens) < new_tokens:
        tokens.append(int(decoder.step(fed).argmax()))
        fed = tokens[-1:]
    return tokens


def _empty(spec: TensorSpec) -> np.ndarray:
    """A cache of batch 1 and length 0: axis 0 is the batch, the other free axis the past."""
    shape = [1 if axis == 0 else 0 if isinstance(dim, str) else dim for axis, dim in enumerate(spec.shape)]
    return np.zeros(shape, dtype=spec.dtype)

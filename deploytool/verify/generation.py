"""Greedy decoding with a KV cache on any runner, and where it could as well have gone on otherwise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deploytool.decoding import Decoder, decoder_of, greedy_tokens
from deploytool.runner import Runner
from deploytool.verify.derived import LEAST


def greedy(runner: Runner, prompt: list[int], new_tokens: int) -> tuple[list[int], list[int | None]]:
    """The `new_tokens` most likely next tokens of a runner, decoded as its users would, batch 1; and for each the one
    that nearly tied with it, or None."""
    watched = _Watched(decoder_of(runner, len(prompt) + new_tokens))
    return greedy_tokens(watched, prompt, new_tokens), watched.rivals


class _Watched:
    """A decoder that remembers the rival of each token it is asked for."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.rivals: list[int | None] = []

    def step(self, tokens: Sequence[int]) -> np.ndarray:
        scores = self._decoder.step(tokens)
        self.rivals.append(rival(scores))
        return scores


def rival(scores: np.ndarray) -> int | None:
    """The second of scores [vocabulary], where the first is ahead by less than rounding may move the two; else None.

    Each may be moved by the relative error that every fp32 engine is allowed, of the scores' root mean square.
    """
    rest = scores.astype(np.float64)
    first = int(rest.argmax())
    ahead = rest[first]
    size = float(np.sqrt(np.mean(np.square(rest[np.isfinite(rest)])))) if np.isfinite(ahead) else 0.0
    rest[first] = -np.inf
    second = int(rest.argmax())
    return second if second != first and ahead - rest[second] <= 2 * LEAST["fp32"] * size else None

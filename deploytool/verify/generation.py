"""Greedy decoding with a KV cache on any runner."""

from __future__ import annotations

from deploytool.decoding import decoder_of, greedy_tokens
from deploytool.runner import Runner


def greedy(runner: Runner, prompt: list[int], new_tokens: int) -> list[int]:
    """The `new_tokens` most likely next tokens of a runner, decoded as its users would; batch 1."""
    return greedy_tokens(decoder_of(runner, len(prompt) + new_tokens), prompt, new_tokens)

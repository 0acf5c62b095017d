"""How a user's language model is measured: perplexity and greedy tokens, on text that its samples do not hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from deploytool.load.causal_lm import inputs_for
from deploytool.load.texts import Tokenize, sentences, tokenizer_of
from deploytool.source import Hooks

LOWER_IS_BETTER = ("perplexity",)
_WINDOWS, _WINDOW = 16, 256  # of text, tokens in each; fewer where the model has fewer positions
_SAMPLED = 400  # sentences at the beginning, which samples are made of
_PROMPTS = (12, 20, 28, 33, 40)  # tokens
_NEW = 32  # what is decoded after a prompt must have positions too
_LEAST = 2  # tokens of a window: the first has no loss

Predict = Callable[[dict[str, Tensor]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class HeldOut:
    """The standard library's documentation, from where samples end. `config` is the model's, of transformers."""

    config: Any
    tokenize: Tokenize

    def hooks(self) -> Hooks:
        """What the model has the positions for; notes say what is left out."""
        if self._positions < _LEAST:
            note = f"perplexity and greedy tokens are not measured: the model has {self._positions} positions"
            return Hooks(notes=(note,))
        if self._positions <= _NEW:
            note = f"greedy tokens are not compared: {_NEW} after a prompt do not fit {self._positions} positions"
            return Hooks(self.evaluate, LOWER_IS_BETTER, notes=(note,))
        return Hooks(self.evaluate, LOWER_IS_BETTER, self.prompts)

    def evaluate(self, predict: Predict, record: Callable[[str, Sequence[float]], None] | None = None
                 ) -> dict[str, float]:  # fmt: skip
        """Perplexity over windows of text; the scores of the windows are their losses in nats."""
        losses = window_losses(predict, self._windows, self.config)
        if record:
            record("perplexity", losses)
        return {"perplexity": math.exp(fmean(losses))}

    def prompts(self) -> list[list[int]]:
        """The beginnings of five windows, 12 to 40 tokens, fewer where positions are; the model has more than 32."""
        most = self._positions - _NEW
        return [row[: min(length, most)].tolist() for row, length in zip(self._windows, _PROMPTS, strict=False)]

    @cached_property
    def _windows(self) -> Tensor:
        """int64 [windows, tokens]; each begins as the tokenizer begins a text."""
        size = min(_WINDOW, self._positions)
        text = " ".join(sentences()[_SAMPLED:])
        ids = self.tokenize(text[: _WINDOWS * _WINDOW * 8])
        begins = self.tokenize("")[:1] == ids[:1]
        first, rest = ids[:1] if begins else [], torch.tensor(ids[1:] if begins else ids)
        size -= len(first)
        rows = rest[: min(_WINDOWS, len(rest) // size) * size].view(-1, size)
        return torch.cat([torch.tensor(first, dtype=torch.int64).expand(len(rows), -1), rows], dim=1)

    @property
    def _positions(self) -> int:
        config = self.config.get_text_config(decoder=True)
        return int(getattr(config, "max_position_embeddings", None) or _WINDOW)


def held_out(config: Any, folder: Path) -> HeldOut | None:
    """What the causal language model in a folder is measured with; None where the folder has no tokenizer."""
    tokenize = tokenizer_of(folder)
    return None if tokenize is None else HeldOut(config, tokenize)


def window_losses(predict: Predict, windows: Tensor, config: Any) -> list[float]:
    """The mean loss of the next token, in nats, of each row of int64 [windows, tokens]; one row per call."""
    losses = []
    for window in windows:
        feeds = inputs_for(config, window[None], torch.ones_like(window)[None])
        losses.append(cross_entropy(predict(feeds)["logits"][0, :-1].float(), window[1:]).item())
    return losses

"""Real text that is on every machine: the standard library's documentation topics, as batches of token ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics

import torch
from tokenizers import Tokenizer
from torch import Tensor

from deploytool.errors import InputRefused

Tokenize = Callable[[str], list[int]]
# (batch, characters of text per row): the first is what is timed, then short, odd and padded ones.
_BATCHES = ((1, 900), (1, 40), (2, 120), (3, 120), (1, 700), (5, 50))
_TIMED_LENGTH = 128


def sentences() -> list[str]:
    """Sentences of 20 to 400 characters, in the order of the topics' sorted names."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    flat = re.sub(r"\s+", " ", text)
    return [s.strip() for s in re.split(r"(?<=[.!?])\s+(?=[A-Z])", flat) if 20 <= len(s.strip()) <= 400]


def tokenizer_of(folder: Path) -> Tokenize | None:
    """The folder's own tokenizer, None when it has none; refused when it loses text."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises bare Exception
        raise InputRefused("DT306", f"{path} must be a tokenizer (got: {str(error)[:200]})") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda text: list(tokenizer.encode(text).ids)


def text_batches(tokenize: Tokenize, longest: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of (ids, mask), both int64 [batch, sequence], right-padded with 0; the first is 1 x 128."""
    stream = iter(sentences())
    batches = []
    for index, (rows, characters) in enumerate(_BATCHES):
        ids = [tokenize(_gather(stream, characters + 10 * row))[:longest] for row in range(rows)]
        if index == 0:
            ids = [ids[0][: min(_TIMED_LENGTH, longest)]]
        batches.append(pad(ids))
    return batches


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Rows of ids as (ids, mask) [batch, longest row]; padding is 0 in both, at the right."""
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, values in enumerate(rows):
        ids[row, : len(values)] = torch.tensor(values)
        mask[row, : len(values)] = 1
    return ids, mask


def _gather(stream: Iterator[str], characters: int) -> str:
    text = ""
    for sentence in stream:
        text = f"{text} {sentence}".strip()
        if len(text) >= characters:
            break
    return text

#!/usr/bin/env python
"""Generates text with the language model beside this file.

    python generate.py "Once upon a time" --tokens 64

NumPy, tokenizers and the runtime of the model are all that it needs; decoder.py opens the model with that.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def chosen(scores: np.ndarray, temperature: float, random: np.random.Generator) -> int:
    """The most likely token at temperature 0, else one drawn from softmax(scores / temperature)."""
    if temperature <= 0:
        return int(scores.argmax())
    weights = np.exp((scores - scores.max()).astype(np.float64) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))


def generate(
    decoder: Any, prompt: Sequence[int], count: int, *, temperature: float = 0.0, seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:  # fmt: skip
    """Up to `count` tokens after `prompt`, until one of `stop` comes; `decoder` as open_decoder gives it."""
    random = np.random.default_rng(seed)
    fed = list(prompt)
    for _ in range(count):
        token = chosen(decoder.step(fed), temperature, random)
        if token in stop:
            return
        yield token
        fed = [token]


def open_decoder(folder: Path, capacity: int) -> Any:
    """The model of `folder` for one sequence of up to `capacity` tokens; its `step` appends some and gives scores."""
    spec = importlib.util.spec_from_file_location("decoder", folder / "decoder.py")
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"decoder.py must lie beside this file, in {folder}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.open_decoder(folder, capacity)


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end a text, where the model's files name them."""
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            ends = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if ends is not None:
                return frozenset([ends] if isinstance(ends, int) else ends)
    return frozenset()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="the text to go on with")
    parser.add_argument("--tokens", type=int, default=64, help="how many new tokens at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from tokenizers import Tokenizer

    folder = Path(__file__).resolve().parent
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    decoder = open_decoder(folder, len(prompt) + options.tokens)
    started, first, tokens = time.perf_counter(), 0.0, []
    print(options.prompt, end="", flush=True)
    told = tokenizer.decode(prompt)
    for token in generate(decoder, prompt, options.tokens, temperature=options.temperature, seed=options.seed,
                          stop=_stops(folder)):  # fmt: skip
        first = first or time.perf_counter() - started
        tokens.append(token)
        text = tokenizer.decode([*prompt, *tokens])
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: the next token completes it
            print(text[len(told) :], end="", flush=True)
            told = text
    seconds = time.perf_counter() - started - first
    print()
    print(f"{len(prompt)} tokens read in {first:.3f} s; {max(0, len(tokens) - 1) / max(seconds, 1e-9):.1f} tokens/s",
          file=sys.stderr)  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

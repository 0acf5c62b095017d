#!/usr/bin/env python
"""Generates text with the language model beside this file.

    python generate.py "Once upon a time" --tokens 64

NumPy, tokenizers and the runtime of the model are all that it needs; decoder.py opens the model with that.
Exit codes: 0 done, or nobody reads on; 2 the prompt or an option cannot be; 4 a package or a file is missing; 5 the
model does not open.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

_TOKENS = 64


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


def _config(folder: Path, name: str) -> Any:
    """What the model's files say under a name; None where they do not."""
    for file in ("generation_config.json", "config.json"):
        if (folder / file).is_file():
            found = json.loads((folder / file).read_text(encoding="utf-8")).get(name)
            if found is not None:
                return found
    return None


def _stops(folder: Path) -> frozenset[int]:
    """The tokens that end a text, where the model's files name them."""
    ends = _config(folder, "eos_token_id")
    return frozenset(() if ends is None else [ends] if isinstance(ends, int) else ends)


def _check_files(folder: Path) -> None:
    """FileNotFoundError for the first file that is not beside this one."""
    for name in ("tokenizer.json", "decoder.py", "artifact.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{name} must lie beside this file, in {folder}")
    entry = json.loads((folder / "artifact.json").read_text(encoding="utf-8"))["entry"]
    if not (folder / entry).is_file():
        raise FileNotFoundError(f"{entry} must lie beside this file, in {folder}")


def refusal(prompt: int, options: argparse.Namespace, positions: int | None) -> str:
    """Why a prompt of so many tokens cannot be gone on with as asked; "" where it can.

    `positions` is how many tokens the model was made for, None where nothing tells it.
    """
    if options.tokens < 1:
        return f"--tokens must be at least 1 (got {options.tokens})"
    if not (options.temperature >= 0 and math.isfinite(options.temperature)):
        return f"--temperature must be 0 or more (got {options.temperature})"
    if options.seed < 0:
        return f"--seed must be 0 or more (got {options.seed})"
    if not prompt:
        return "the prompt must have at least one token (got none)"
    if positions is not None and prompt >= positions:
        return f"the prompt must leave room in the model's {positions} positions (got {prompt} tokens)"
    if positions is not None and prompt + options.tokens > positions:
        return (f"the prompt of {prompt} tokens leaves room for {positions - prompt} in the model's {positions} "
                f"positions (got --tokens {options.tokens})")  # fmt: skip
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="the text to go on with")
    parser.add_argument("--tokens", type=int, help="how many new tokens at most; left out: 64, or as "
                        "many as the model has positions for")  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    try:
        return _write(options, Path(__file__).resolve().parent)
    except (ImportError, FileNotFoundError) as error:
        return _refused(str(error), 4)
    except BrokenPipeError:  # as `head` leaves behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes what is left when it ends
        return 0
    except Exception as error:  # whatever a runtime, or a tokenizer, raises for a file that it refuses
        return _refused(f"the model does not run: {' '.join(str(error).split())[:500]}", 5)


def _refused(why: str, code: int) -> int:
    print(f"generate.py: {why}", file=sys.stderr)
    return code


def _write(options: argparse.Namespace, folder: Path) -> int:
    """Print the text as it comes, and the rates after it."""
    from tokenizers import Tokenizer

    _check_files(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode(options.prompt, add_special_tokens=False).ids
    positions = _config(folder, "max_position_embeddings") or _config(folder, "n_positions")
    if options.tokens is None:
        options.tokens = max(1, min(_TOKENS, (positions or math.inf) - len(prompt)))
    if why := refusal(len(prompt), options, positions):
        return _refused(why, 2)
    try:
        decoder = open_decoder(folder, len(prompt) + options.tokens)
    except ImportError:
        raise
    except Exception as error:  # whatever a runtime raises for a file that it refuses
        return _refused(f"the model does not open: {' '.join(str(error).split())[:500]}", 5)
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

"""How fast a language model reads a prompt and how fast it goes on, apart: one sequence, the engine's own decoder."""

from __future__ import annotations

import gc
import importlib
import statistics
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.decoding import decoder_of, greedy_tokens
from deploytool.worker import Limits, Worker

PROMPT, NEW = 128, 64
ROUNDS = 3
_OPENER = "deploytool.backends.base:open_as_used"


class Decoding:
    """A language model, opened in a process of its own. Arguments and results are JSON."""

    def __init__(self, folder: str, prompt: int, new: int, seed: int, opener: str = _OPENER) -> None:
        module, _, function = opener.partition(":")
        self._runner = getattr(importlib.import_module(module), function)(Artifact.load(Path(folder), check=False))
        self._runner.__enter__()
        self._prompt = np.random.default_rng(seed).integers(1, _vocabulary(self._runner), prompt).tolist()
        self._new = new
        greedy_tokens(decoder_of(self._runner, prompt + 2), self._prompt, 2)  # memory is taken, threads are there

    def run(self) -> dict[str, float]:
        """Seconds of one prompt until its first token, and of the tokens after that; the collector rests meanwhile."""
        decoder = decoder_of(self._runner, len(self._prompt) + self._new)
        gc.collect()
        gc.disable()
        try:
            start = time.perf_counter()
            token = int(decoder.step(self._prompt).argmax())
            first = time.perf_counter()
            greedy_tokens(decoder, [token], self._new)
            return {"prefill": first - start, "decode": time.perf_counter() - first}
        finally:
            gc.enable()


def _vocabulary(runner: Any) -> int:
    """How many token ids are sure to exist."""
    sizes = [spec.shape[-1] for spec in runner.signature.outputs if spec.name == "logits"]
    return min([size for size in sizes if isinstance(size, int)] or [2])


def measure_decoding(
    artifacts: Mapping[str, Artifact], limits: Limits, *, prompt: int = PROMPT, new: int = NEW, rounds: int = ROUNDS,
    seed: int = 0, opener: str = _OPENER,
) -> dict[str, Any]:  # fmt: skip
    """Tokens per second of prefill and decoding of each artifact, in turns, and how much faster the first is.

    Each artifact has a process of its own; the median of the rounds counts. Keys: prompt_tokens, new_tokens, rounds,
    prefill_tokens_per_s, decode_tokens_per_s of the first artifact, and `against`: per other artifact its own two
    rates, prefill_speedup and decode_speedup, medians of the rounds' ratios, and prefill_speedup_range and
    decode_speedup_range, the lowest and highest of them.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in artifacts}
    with ExitStack() as stack:
        workers = {}
        for name, artifact in artifacts.items():
            worker = stack.enter_context(Worker(f"decoding {name or 'candidate'}", limits))
            worker.create("deploytool.bench.decoding:Decoding", folder=str(artifact.folder.absolute()), prompt=prompt,
                          new=new, seed=seed, opener=opener)  # fmt: skip
            workers[name] = worker
        for turn in range(rounds):
            for name in list(workers)[:: 1 if turn % 2 == 0 else -1]:
                times[name].append(workers[name].invoke("run"))
    return summarize_decoding(times, prompt, new)


def told(figures: Mapping[str, Any]) -> str:
    """The figures of `measure_decoding` as a sentence."""
    parts = [f"{name} {_ratio(found, 'decode')} and {_ratio(found, 'prefill')}"
             for name, found in figures["against"].items()]  # fmt: skip
    return (f"decodes {figures['decode_tokens_per_s']:.1f} tokens/s after a prompt of {figures['prompt_tokens']}, read "
            f"at {figures['prefill_tokens_per_s']:.0f}; that is, against " + ", ".join(parts))  # fmt: skip


def _ratio(found: Mapping[str, Any], part: str) -> str:
    low, high = found[f"{part}_speedup_range"]
    return f"{found[f'{part}_speedup']:.2f}x (rounds {low:.2f} to {high:.2f})"


def summarize_decoding(times: Mapping[str, list[dict[str, float]]], prompt: int, new: int) -> dict[str, Any]:
    """The result of the rounds' seconds; the first artifact is compared with the others."""
    (first, own), *others = times.items()
    rates = {name: {"prefill_tokens_per_s": prompt / statistics.median(t["prefill"] for t in found),
                    "decode_tokens_per_s": new / statistics.median(t["decode"] for t in found)}
             for name, found in times.items()}  # fmt: skip
    against = {name: {**rates[name], **_speedups(own, found)} for name, found in others}
    return {"prompt_tokens": prompt, "new_tokens": new, "rounds": len(own), **rates[first], "against": against}


def _speedups(own: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in ("prefill", "decode"):
        ratios = [b[part] / a[part] for a, b in zip(own, other, strict=True)]
        found |= {f"{part}_speedup": statistics.median(ratios), f"{part}_speedup_range": [min(ratios), max(ratios)]}
    return found

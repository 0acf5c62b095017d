#!/usr/bin/env python
"""What structured pruning without training leaves of MiniLM: cosine of the sentence embeddings, parameters, seconds.

    python scripts/bench/prune_encoder.py --remove 0.5

Calibration: docstrings of the standard library's top-level files without those that hold a sentence of the evaluation,
or with --sentences their sentences of 20 to 400 characters, all or --texts of them spread evenly, cut at --length
tokens. Evaluation: the 256 sentences of the model's own evaluation, which are from the standard library's topics; with
--choose, to compare settings without a look at those, the sentences of every fifth docstring, which are then left out
of the calibration. With -o the model is written as `compress` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from prune_lm import docstrings, peak_bytes
from torch import Tensor
from torch.nn.functional import cosine_similarity

from deploytool.compress.prune.structured import apply
from deploytool.compress.prune.tables import Structured
from deploytool.compress.run import measure, predict
from deploytool.compress.step import Calibration, Context
from deploytool.load.compressed import save_compressed
from deploytool.load.model import open_source
from deploytool.load.modelfile import read_model_file
from deploytool.load.resolve import resolve
from deploytool.source import Source

BATCH = 8


def calibration(held_out: list[str]) -> list[str]:
    """Docstrings, white space made single, without those in which a held-out sentence stands."""
    found = [" ".join(text.split()) for text in docstrings()]
    return [text for text in found if not any(sentence in text for sentence in held_out)]


def spread(texts: list[str], count: int | None) -> list[str]:
    """`count` of them, evenly spread; all where left out."""
    return texts[:: max(1, len(texts) // (count or len(texts)))][:count]


def sentences(texts: list[str]) -> list[str]:
    """Their sentences of 20 to 400 characters, each once, in order."""
    parts = (part for text in texts for part in re.split(r"(?<=[.!?]) (?=[A-Z])", text) if 20 <= len(part) <= 400)
    return list(dict.fromkeys(parts))


def embeddings(source: Source, feeds: list[dict[str, Tensor]]) -> Tensor:
    """float32 [sentences, 384]."""
    return torch.cat([predict(source, batch)["sentence_embedding"] for batch in feeds])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", type=float, default=0.5)
    parser.add_argument("--texts", type=int, help="of calibration; left out: all")
    parser.add_argument("--sentences", action="store_true", help="calibrate with sentences instead of whole docstrings")
    parser.add_argument("--choose", action="store_true", help="evaluate on held-out docstrings instead")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the step")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    asked: dict[str, Any] = {k: json.loads(v) for k, _, v in (item.partition("=") for item in args.set)}
    settings = Structured(step="structured", remove=args.remove, **asked)
    source = open_source(resolve("minilm"))
    code = read_model_file(source.ref).code
    held_out = code._held_out()
    found = calibration(held_out)
    if args.choose:
        held_out = spread(sentences(found[4::5]), 400)
        found = [text for index, text in enumerate(found) if index % 5 != 4]
    texts = sorted(spread(sentences(found) if args.sentences else found, args.texts), key=len)
    batches = [code._encode(texts[i : i + BATCH], args.length) for i in range(0, len(texts), BATCH)]
    calibrated = dataclasses.replace(source, samples=lambda: iter(batches))
    context = Context(source, Calibration(samples=len(batches)), 0, lambda line: print(line, file=sys.stderr))
    started, cpu_started = time.perf_counter(), time.process_time()
    pruned, report = apply(calibrated, settings, context)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    pruned = dataclasses.replace(pruned, samples=source.samples)
    ordered = sorted(held_out, key=len)
    feeds = [code._encode(ordered[i : i + BATCH], 128) for i in range(0, len(ordered), BATCH)]
    cosines = cosine_similarity(embeddings(source, feeds), embeddings(pruned, feeds), dim=1)
    before, after = (measure(s, evaluate=True) for s in (source, pruned))
    blocks = [sum(p.numel() for n, p in s.module.named_parameters() if ".layer." in n) for s in (source, pruned)]
    result = {
        "model": "minilm", "settings": settings.model_dump(mode="json"), "texts": len(texts), "seconds": seconds,
        "evaluated_on": "held-out docstrings" if args.choose else "the model's evaluation",
        "tokens": sum(int(batch["attention_mask"].sum()) for batch in batches), "cpu_seconds": cpu_seconds,
        "cosine_mean": float(cosines.mean()), "cosine_worst": float(cosines.min()), "before": before, "after": after,
        "block_parameters": blocks, "blocks_ratio": blocks[1] / blocks[0], "peak_bytes": peak_bytes(),
        "layers": report["layers"],
    }  # fmt: skip
    if args.output:
        report = {"before": before, "after": after, "steps": [{"step": "structured", **report}]}
        save_compressed(pruned, source, report, args.output, overwrite=True)
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

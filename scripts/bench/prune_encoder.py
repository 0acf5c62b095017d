#!/usr/bin/env python
"""What structured pruning without training leaves of MiniLM: cosine of the sentence embeddings, parameters, seconds.

    python scripts/bench/prune_encoder.py --remove 0.5

Calibration: docstrings of the standard library's top-level files without those that hold a sentence of the evaluation,
all or --texts of them spread evenly, cut at --length tokens. Evaluation: the 256 sentences of the model's own
evaluation, which are from the standard library's topics. With -o the model is written as `compress` does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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


def calibration(count: int | None, held_out: list[str]) -> list[str]:
    """Docstrings, white space made single, without those in which a held-out sentence stands."""
    found = [" ".join(text.split()) for text in docstrings()]
    found = [text for text in found if not any(sentence in text for sentence in held_out)]
    return found[:: max(1, len(found) // (count or len(found)))][:count]


def embeddings(source: Source, feeds: list[dict[str, Tensor]]) -> Tensor:
    """float32 [sentences, 384]."""
    return torch.cat([predict(source, batch)["sentence_embedding"] for batch in feeds])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--remove", type=float, default=0.5)
    parser.add_argument("--texts", type=int, help="of calibration; left out: all")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text at most")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the step")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    asked: dict[str, Any] = {k: json.loads(v) for k, _, v in (item.partition("=") for item in args.set)}
    settings = Structured(step="structured", remove=args.remove, **asked)
    source = open_source(resolve("minilm"))
    code = read_model_file(source.ref).code
    texts = sorted(calibration(args.texts, code._sentences()[5::9][:256]), key=len)
    batches = [code._encode(texts[i : i + BATCH], args.length) for i in range(0, len(texts), BATCH)]
    calibrated = dataclasses.replace(source, samples=lambda: iter(batches))
    context = Context(source, Calibration(samples=len(batches)), 0, lambda line: print(line, file=sys.stderr))
    started, cpu_started = time.perf_counter(), time.process_time()
    pruned, report = apply(calibrated, settings, context)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    pruned = dataclasses.replace(pruned, samples=source.samples)
    feeds = code._evaluation()
    cosines = cosine_similarity(embeddings(source, feeds), embeddings(pruned, feeds), dim=1)
    before, after = (measure(s, evaluate=True) for s in (source, pruned))
    blocks = [sum(p.numel() for n, p in s.module.named_parameters() if ".layer." in n) for s in (source, pruned)]
    result = {
        "model": "minilm", "settings": settings.model_dump(mode="json"), "texts": len(texts), "seconds": seconds,
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

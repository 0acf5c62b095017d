#!/usr/bin/env python
"""What low rank costs: MiniLM's linears with 30 % of their weights removed, plain and activation-aware, same size.

    python scripts/bench/factorize.py                      # the figures of quality, JSON
    python scripts/bench/factorize.py --save FOLDER        # also writes the best variant as a folder that export takes

Calibration: docstrings longer than 200 characters of the standard library's top-level modules, in windows of 126 tokens
between [CLS] and [SEP]. Evaluation: 256 sentences of the Python reference, which calibration has not seen; the figure
is the cosine of each sentence's embedding with the original model's.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.functional import cosine_similarity

from deploytool.compress.factorize.svd import apply
from deploytool.compress.factorize.tables import Svd
from deploytool.compress.run import measure
from deploytool.compress.step import Calibration, Context
from deploytool.load.compressed import save_compressed
from deploytool.load.model import open_source
from deploytool.load.modelfile import read_model_file
from deploytool.load.resolve import resolve
from deploytool.source import Source

WIDTH, WINDOWS, TOGETHER = 126, 128, 8
Feeds = dict[str, Tensor]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"keep": 0.7},
    "whitened": {"keep": 0.7, "whiten": True},
    "whitened, one budget": {"budget": 0.7, "whiten": True},
    "whitened, one budget, reconstructed": {"budget": 0.7, "whiten": True, "reconstruct": True},
}


def docstrings() -> str:
    """Docstrings over 200 characters of the library's top-level files, in the order of files and of `ast.walk`."""
    found = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node)
                if text and len(text) > 200:
                    found.append(text)
    return "\n\n".join(found)


def calibration(tokenizer: Tokenizer) -> list[Feeds]:
    """Seeded windows of the docstrings in batches."""
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(docstrings(), add_special_tokens=False).ids
    windows = [ids[i : i + WIDTH] for i in range(0, len(ids) - WIDTH, WIDTH)]
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:WINDOWS].sort().values
    first, last = (tokenizer.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    rows = torch.tensor([[first, *windows[int(i)], last] for i in picked])
    return [{"input_ids": part, "attention_mask": torch.ones_like(part), "token_type_ids": torch.zeros_like(part)}
            for part in rows.split(TOGETHER)]  # fmt: skip


def embeddings(source: Source, batches: list[Feeds]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([source.module(**feeds)["sentence_embedding"] for feeds in batches])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="write the last variant there")
    parser.add_argument("--only", choices=VARIANTS, help="run this variant alone")
    args = parser.parse_args()
    ref = resolve("minilm")
    code = read_model_file(ref).code
    source = open_source(ref)
    texts = calibration(Tokenizer.from_file(str(code._folder() / "tokenizer.json")))
    calibrated = dataclasses.replace(source, samples=lambda: iter(texts))
    context = Context(source, Calibration(samples=len(texts)), 0, lambda line: print(line, file=sys.stderr))
    batches = code._evaluation()
    wanted = embeddings(source, batches)
    weights = sum(m.weight.numel() for m in source.module.modules() if isinstance(m, torch.nn.Linear))
    results, made, report = {}, source, {}
    for name, settings in VARIANTS.items():
        if args.only not in (None, name):
            continue
        started = time.perf_counter()
        made, report = apply(calibrated, Svd(step="svd", **settings), context)
        seconds = time.perf_counter() - started
        cosines = cosine_similarity(embeddings(made, batches), wanted, dim=1)
        left = weights + sum(layer["parameters_after"] - layer["parameters_before"] for layer in report["layers"])
        results[name] = {"mean_cosine": float(cosines.mean()), "worst_cosine": float(cosines.min()),
                         "weights_left": left / weights, "layers": len(report["layers"]),
                         "seconds": seconds}  # fmt: skip
        print(name, results[name], file=sys.stderr)
    if args.save:
        made = dataclasses.replace(made, samples=source.samples, original=ref)
        steps = {"before": measure(source, False), "after": measure(made, False), "steps": [report]}
        save_compressed(made, source, steps, args.save, overwrite=True)
    tokens = sum(feeds["input_ids"].numel() for feeds in texts)
    found = {"schema_version": "1.0", "model": "minilm", "calibration_tokens": tokens,
             "evaluation_sentences": len(wanted), "weights": weights, "variants": results}  # fmt: skip
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

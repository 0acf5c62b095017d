#!/usr/bin/env python
"""What pruning costs SmolLM2-135M: perplexity before and after, seconds and peak memory, one method per process.

    python scripts/bench/prune_lm.py --method sparsegpt --sparsity 0.5
    python scripts/bench/prune_lm.py --method sparsegpt --sparsity 0.5 --set repair=true
    python scripts/bench/prune_lm.py --method sparsegpt --sparsity 0.5 --precision bfloat16
    python scripts/bench/prune_lm.py --method wanda --pattern 2:4

Calibration: docstrings of the standard library, 32 windows of 512 tokens. Evaluation: the standard library's topics, 24
windows of 512 tokens. The linears of the decoder's blocks are pruned; the embedding and its tied head are not. The
peaks are of reading the model and pruning it, without any evaluation.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import json
import platform
import resource
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import quantize_lm
import torch
from quantize_lm import SAVE, open_model

from deploytool.compress.prune import magnitude, sparsegpt, wanda
from deploytool.compress.prune.tables import Magnitude, SparseGpt, Wanda
from deploytool.compress.run import measure, predict
from deploytool.compress.step import Calibration, Context
from deploytool.load.modelfile import read_model_file
from deploytool.load.resolve import resolve
from deploytool.source import Source

WINDOWS, SHORTEST = 32, 200
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


def open_lm(folder: Path, windows: int) -> Source:
    """The language model of a Hugging Face folder once in memory, with some of the calibration windows as samples."""
    source: Source = open_model(folder)[1]
    samples = list(source.samples())[:windows]
    return dataclasses.replace(source, samples=lambda: iter(samples))


def peak_bytes() -> int:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def perplexity(source: Source, windows: int) -> float:
    """On the first `windows` windows of the evaluation text."""
    file = read_model_file(resolve("smollm2"))
    return float(file.code.perplexity(lambda feeds: predict(source, feeds), windows))


def dense_perplexity(folder: Path, windows: int) -> float:
    """Of the model as it is, in a process of its own: what the evaluation holds is no part of what pruning takes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_dense, folder, windows).result()


def _dense(folder: Path, windows: int) -> float:
    return perplexity(open_model(folder)[1], windows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=METHODS, default="sparsegpt")
    parser.add_argument("--sparsity", type=float)
    parser.add_argument("--pattern")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="another setting of the step")
    parser.add_argument("--windows", type=int, default=WINDOWS, help="of calibration")
    parser.add_argument("--eval-windows", type=int, default=24)
    parser.add_argument("--dense", type=float, help="the dense model's perplexity, when it is known")
    parser.add_argument("--precision", default="float32", help="that of [calibration]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="the model as a Hugging Face folder; written where it is not there")
    args = parser.parse_args()
    table = METHODS[args.method][1]
    asked = {key: json.loads(value) for key, _, value in (item.partition("=") for item in args.set)}
    asked |= {k: v for k, v in (("sparsity", args.sparsity), ("pattern", args.pattern)) if v is not None}
    settings = table(step=args.method, include=("*.layers.*",), **asked)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch) / "model"
        if not folder.is_dir():
            subprocess.run([sys.executable, "-c", SAVE, quantize_lm.__file__, str(folder)], check=True)
        dense = args.dense or dense_perplexity(folder, args.eval_windows)
        calibration = Calibration.model_validate({"samples": args.windows, "precision": args.precision})
        torch.set_num_threads(args.threads)
        print(json.dumps(run(folder, settings, dense, calibration, args.eval_windows), indent=2))
    return 0


def run(folder: Path, settings: Any, dense: float, calibration: Calibration, eval_windows: int) -> dict[str, Any]:
    """Prune in this process; the peaks are of its whole life until then."""
    source = open_lm(folder, calibration.samples)
    loaded, before = peak_bytes(), measure(source, evaluate=False)
    context = Context(source, calibration, 0, lambda line: print(line, file=sys.stderr, flush=True))
    apply = METHODS[settings.step][0].apply
    in_place = {"in_place": True} if "in_place" in inspect.signature(apply).parameters else {}
    started, cpu_started = time.perf_counter(), time.process_time()
    pruned, report = apply(source, settings, context, **in_place)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    peak = peak_bytes()
    del source, context
    after = perplexity(pruned, eval_windows)
    elements = sum(layer["elements"] for layer in report["layers"])
    return {
        "model": "smollm2", "settings": settings.model_dump(mode="json"), "layers": len(report["layers"]),
        "sparsity": sum(layer["zeros"] for layer in report["layers"]) / elements,
        "perplexity_before": dense, "perplexity_after": after, "ratio": after / dense, "seconds": seconds,
        "cpu_seconds": cpu_seconds, "peak_loaded_bytes": loaded, "peak_bytes": peak, "before": before,
        "after": measure(pruned, evaluate=False), "threads": torch.get_num_threads(), "machine": platform.processor(),
        "precision": report.get("precision"),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

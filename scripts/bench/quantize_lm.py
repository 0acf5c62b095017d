#!/usr/bin/env python
"""What quantization costs a language model: perplexity, seconds and memory of SmolLM2-135M, one process per method.

    python scripts/bench/quantize_lm.py fp32 rtn gptq awq awq+gptq found > quantize_lm.json
    python scripts/bench/quantize_lm.py gptq --set bits=3 --set group=32

Prints one JSON document. Perplexity is that of the shipped model: the first 24 windows of 512 tokens of the standard
library's topics. Calibration text: docstrings longer than 200 characters of functions, classes and modules of the
standard library's top-level files in sorted order, joined by blank lines, in windows of 512 tokens, of which
`torch.randperm` with seed 0 picks 32. All linear layers of the blocks are quantized; embedding and head stay.
`seconds` is the steps' wall time without loading; the peaks are of the process's whole life until then.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import platform
import resource
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

GRID: dict[str, Any] = {"bits": 4, "group": 64}
METHODS: dict[str, list[dict[str, Any]]] = {
    "fp32": [],
    "rtn": [{"step": "rtn", **GRID}],
    "found": [{"step": "rtn", "group": "found"}],
    "gptq": [{"step": "gptq", **GRID}],
    "awq": [{"step": "awq", **GRID}],
    "awq+gptq": [{"step": "awq", **GRID, "round": False}, {"step": "gptq", **GRID}],
}
WINDOWS, WINDOW = 32, 512


def docstrings() -> Iterator[str]:
    """The calibration text, piece by piece."""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Module)):
                text = ast.get_docstring(node) or ""
                if len(text) > 200:
                    yield text


def open_model() -> tuple[Any, Any]:
    """The shipped model's file, and a Source whose samples are the calibration windows; its weights are held once."""
    import torch

    from deploytool.load.flat import FlatModule
    from deploytool.load.modelfile import read_model_file
    from deploytool.load.resolve import resolve
    from deploytool.signature import Signature, TensorSpec
    from deploytool.source import Source

    ref = resolve("smollm2")
    code = read_model_file(ref).code
    module = code.CausalLM(code._pretrained()).eval()
    ids = torch.tensor(code._tokenize("\n\n".join(docstrings())))
    windows = ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)
    picked = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:WINDOWS].sort().values
    ones = torch.ones(1, WINDOW, dtype=torch.int64)
    samples = [code.inputs_for(code._CONFIG, window[None], ones) for window in windows[picked]]
    inputs = tuple(TensorSpec(name, "float32" if len(shape) == 4 else "int64", tuple(shape))
                   for name, shape in code.INPUTS.items())  # fmt: skip
    signature = Signature(inputs, (TensorSpec("logits", "float32", ("batch", "sequence", 49152)),))
    flat = FlatModule(module, signature.input_names, signature.output_names)
    return code, Source(ref, module, flat, signature, samples=lambda: iter(samples), evaluate=code.evaluate)


def run(method: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """One method in this process."""
    import torch

    from deploytool.compress.recipe import parse_recipe
    from deploytool.compress.run import predict
    from deploytool.compress.step import Calibration, Context

    torch.manual_seed(0)
    recipe = parse_recipe({"compress": steps}, "", where=method)
    code, source = open_model()
    loaded = _peak()
    context = Context(source, Calibration(samples=WINDOWS), 0, lambda line: print(line, file=sys.stderr, flush=True))
    started, used = time.perf_counter(), time.process_time()
    reports = []
    for settings in recipe.steps:
        source, report = importlib.import_module(settings.code).apply(source, settings, context)
        reports.append(report)
    seconds, cpu, peak = time.perf_counter() - started, time.process_time() - used, _peak()
    perplexity = code.perplexity(lambda feeds: predict(source, feeds), code.WINDOWS)
    layers = [layer for report in reports for layer in report.get("layers", [])]
    return {
        "method": method, "steps": recipe.plan(), "perplexity": perplexity, "seconds": seconds, "cpu_seconds": cpu,
        "peak_loaded_bytes": loaded, "peak_bytes": peak, "layers": len(layers), "threads": torch.get_num_threads(),
        "bits_per_weight": _mean([layer["bits_per_weight"] for layer in layers if "bits_per_weight" in layer]),
        "output_error": _mean([layer["output_error"] for layer in layers if "output_error" in layer]),
    }  # fmt: skip


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=sorted(METHODS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every step")
    parser.add_argument("--here", action="store_true", help="run the one method in this process")
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.here:
        changes = {key: json.loads(value) for key, value in (part.split("=", 1) for part in options.set)}
        if options.threads:
            import torch

            torch.set_num_threads(options.threads)
        print(json.dumps(run(options.methods[0], [{**s, **changes} for s in METHODS[options.methods[0]]])))
        return
    results = []
    for method in options.methods:
        settings = [argument for pair in options.set for argument in ("--set", pair)]
        command = [sys.executable, __file__, method, "--here", "--threads", str(options.threads), *settings]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    reference = next((r["perplexity"] for r in results if r["method"] == "fp32"), None)
    for result in results:
        result["ratio"] = result["perplexity"] / reference if reference else None
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                      "results": results}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()

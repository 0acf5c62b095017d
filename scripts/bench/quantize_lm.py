#!/usr/bin/env python
"""What quantization costs a language model: perplexity, seconds and memory of SmolLM2-135M, one process per method.

    python scripts/bench/quantize_lm.py fp32 rtn gptq awq awq+gptq found > quantize_lm.json
    python scripts/bench/quantize_lm.py gptq --set bits=3 --set group=32
    python scripts/bench/quantize_lm.py fp32 gptq --precision bfloat16

Prints one JSON document. Perplexity is that of the shipped model: the first 24 windows of 512 tokens of the standard
library's topics; calibration is on the model file's 32 windows of docstrings. All linear layers of the blocks are
quantized; embedding and head stay. `seconds` is the steps' wall time without loading; the peaks are of the process's
whole life until then, in which it has read the model and taken the steps, and evaluated nothing.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
    "mixed": [{"step": "mixed-precision", "mean_bits": 4.3125, "group": 64}],
}
SAVE = "import runpy, sys, pathlib; runpy.run_path(sys.argv[1])['save_model'](pathlib.Path(sys.argv[2]))"


def save_model(folder: Path) -> None:
    """Write the shipped model as a Hugging Face folder: reading its GGUF file takes more memory than quantizing."""
    from deploytool.load.modelfile import read_model_file
    from deploytool.load.resolve import resolve

    model = read_model_file(resolve("smollm2")).code._pretrained()
    model.hf_quantizer = None  # it was read as floats, which transformers would not believe
    del model.config.quantization_config
    model.save_pretrained(folder)


def windows() -> list[list[int]]:
    """The token ids of the shipped model's calibration windows."""
    from deploytool.load.modelfile import read_model_file
    from deploytool.load.resolve import resolve

    return [sample["input_ids"][0].tolist() for sample in read_model_file(resolve("smollm2")).code.calibration()]


def open_model(folder: Path) -> tuple[Any, Any]:
    """The shipped model's file, and a Source whose samples are the calibration windows; its weights are held once.

    The text becomes tokens in a process of its own: what that takes is no part of what a step takes.
    """
    import torch
    import transformers

    from deploytool.load.causal_lm import inputs_for
    from deploytool.load.flat import FlatModule
    from deploytool.load.modelfile import read_model_file
    from deploytool.load.resolve import resolve
    from deploytool.signature import Signature, TensorSpec
    from deploytool.source import Source

    ref = resolve("smollm2")
    code = read_model_file(ref).code
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    module = code.CausalLM(model).eval().requires_grad_(False)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        rows = [torch.tensor([row]) for row in pool.submit(windows).result()]
    samples = [inputs_for(module.config, row, torch.ones_like(row)) for row in rows]
    inputs = tuple(TensorSpec(name, "float32" if len(shape) == 4 else "int64", tuple(shape))
                   for name, shape in code.INPUTS.items())  # fmt: skip
    signature = Signature(inputs, (TensorSpec("logits", "float32", ("batch", "sequence", 49152)),))
    flat = FlatModule(module, signature.input_names, signature.output_names)
    return code, Source(ref, module, flat, signature, samples=lambda: iter(samples), evaluate=code.evaluate)


def run(method: str, steps: list[dict[str, Any]], folder: Path, precision: str) -> dict[str, Any]:
    """One method in this process."""
    import torch

    from deploytool.compress.recipe import parse_recipe
    from deploytool.compress.run import predict
    from deploytool.compress.step import Calibration, Context

    torch.manual_seed(0)
    recipe = parse_recipe({"compress": steps}, "", where=method)
    code, source = open_model(folder)
    loaded = _peak()
    calibration = Calibration.model_validate({"precision": precision})
    context = Context(source, calibration, 0, lambda line: print(line, file=sys.stderr, flush=True))
    started, used = time.perf_counter(), time.process_time()
    reports = []
    for settings in recipe.steps:
        apply = importlib.import_module(settings.code).apply
        in_place = {"in_place": True} if "in_place" in inspect.signature(apply).parameters else {}
        source, report = apply(source, settings, context, **in_place)
        reports.append(report)
    seconds, cpu, peak = time.perf_counter() - started, time.process_time() - used, _peak()
    perplexity = code.perplexity(lambda feeds: predict(source, feeds), code.WINDOWS)
    layers = [layer for report in reports for layer in report.get("layers", [])]
    return {
        "method": method, "steps": recipe.plan(), "perplexity": perplexity, "seconds": seconds, "cpu_seconds": cpu,
        "peak_loaded_bytes": loaded, "peak_bytes": peak, "layers": len(layers), "threads": torch.get_num_threads(),
        "precision": [report["precision"] for report in reports if "precision" in report],
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
    parser.add_argument("--folder", type=Path, help="the model as a Hugging Face folder; written where it is not there")
    parser.add_argument("--here", action="store_true", help="run the one method in this process")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="float32", help="that of [calibration]")
    options = parser.parse_args()
    if options.here:
        print(json.dumps(_here(options)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "model"
        if not folder.is_dir():
            subprocess.run([sys.executable, "-c", SAVE, __file__, str(folder)], check=True)
        results = [_child(method, folder, options) for method in options.methods]
    reference = next((r["perplexity"] for r in results if r["method"] == "fp32"), None)
    for result in results:
        result["ratio"] = result["perplexity"] / reference if reference else None
    print(json.dumps({"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(),
                      "results": results}, indent=2))  # fmt: skip


def _here(options: argparse.Namespace) -> dict[str, Any]:
    import torch

    torch.set_num_threads(options.threads)
    changes = {key: json.loads(value) for key, value in (part.split("=", 1) for part in options.set)}
    return run(options.methods[0], [{**step, **changes} for step in METHODS[options.methods[0]]], options.folder,
               options.precision)  # fmt: skip


def _child(method: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, method, "--here", "--folder", str(folder), "--threads", str(options.threads),
               "--precision", options.precision]  # fmt: skip
    command += [argument for pair in options.set for argument in ("--set", pair)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    main()

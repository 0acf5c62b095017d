#!/usr/bin/env python
"""Language models on this machine: decoding, prefill, perplexity, bytes per token; every artifact against eager.

    python scripts/bench/lm.py --model smollm2 --target ort --target ort-weight-int8 --target ort-int4 > lm.json
    taskset -c 0 python scripts/bench/lm.py --out /tmp/lm --no-perplexity      # one thread, artifacts of an earlier run

Exports MODEL to every target without timing (artifacts that lie in --out already are taken), then times all of them and
eager PyTorch in turns: a prompt of 128 tokens, 64 new ones, one sequence, each in a process of its own on as many
threads as there are cores to run on. Eager decodes with its cache, without copies to NumPy. Perplexity is the model's
own `evaluate` on --windows windows where it has a function `perplexity(predict, windows)`.

`bytes_per_token` counts the weights that a decoded token reads and the cache of 160 tokens; `bandwidth_share` is what
that makes of the bandwidth that a sum over 1 GB reaches on the same threads. Prints one JSON document.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TARGETS = ("ort", "ort-weight-int8", "ort-int4")
LOOKUPS = ("Gather", "GatherBlockQuantized")  # they read single rows
CACHED_TOKENS = 160  # the middle of the decoding that is timed


def exported(model: str, target: str, out: Path) -> Path:
    """The artifact's folder, also of one whose figures are outside its profile's limits."""
    folders = [out / target, out / f"{target}.failed"]
    if not any(folder.is_dir() for folder in folders):
        command = [sys.executable, "-m", "deploytool", "export", model, "--target", target, "-o", str(out),
                   "--no-bench", "--no-quality", "--overwrite", "--json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if not any(folder.is_dir() for folder in folders):
            raise SystemExit(f"{target}: {done.stderr[-2000:]}")
    return next(folder for folder in folders if folder.is_dir())


def bytes_per_token(folder: Path, entry: str) -> int | None:
    """Bytes of weights and cache that one decoded token reads; None for what is no ONNX graph."""
    if not entry.endswith(".onnx"):
        return None
    import onnx_ir as ir

    graph = ir.load(folder / entry).graph
    constants = [(value.const_value, value.uses()) for value in graph.initializers.values()]
    weights = sum(tensor.nbytes for tensor, uses in constants
                  if tensor is not None and any(node.op_type not in LOOKUPS for node, _ in uses))  # fmt: skip
    cache = 0
    for value in graph.inputs:
        if str(value.name).startswith("past_key_values.") and value.shape is not None:
            cache += 4 * CACHED_TOKENS * int(value.shape[1]) * int(value.shape[3])
    return weights + cache


def read_bandwidth(threads: int) -> float:
    """Bytes per second of summing 1 GB, the best of ten."""
    import torch

    torch.set_num_threads(threads)
    data = torch.ones(250_000_000)
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - start)
    return data.nbytes / best


def perplexity_job(folder: str, ref: dict[str, str], windows: int) -> float:
    """Perplexity of an artifact by the model's own code (in a worker)."""
    from deploytool.artifact import Artifact
    from deploytool.backends.base import open_artifact
    from deploytool.load.modelfile import read_model_file
    from deploytool.load.predict import tensor_predict
    from deploytool.source import ModelRef

    code = read_model_file(ModelRef(**ref)).code
    with open_artifact(Artifact.load(Path(folder), check=False)) as runner:
        return float(code.perplexity(tensor_predict(runner), windows))


def measure(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    from deploytool.artifact import Artifact
    from deploytool.bench.decoding import measure_decoding
    from deploytool.bench.environment import environment
    from deploytool.worker import NO_LIMITS

    names = list(dict.fromkeys(["eager", *(options.target or TARGETS)]))
    artifacts = {name: Artifact.load(exported(options.model, name, out), check=False) for name in names}
    threads = len(os.sched_getaffinity(0))
    bandwidth = read_bandwidth(threads)
    timed = measure_decoding(artifacts, NO_LIMITS, rounds=options.rounds)  # eager first: ratios are turned around
    rates = {"eager": timed, **timed["against"]}
    results: dict[str, Any] = {}
    for name, artifact in artifacts.items():
        found: dict[str, Any] = {key: rates[name][f"{key}_tokens_per_s"] for key in ("prefill", "decode")}
        found = {f"{key}_tokens_per_s": value for key, value in found.items()} | {"size_bytes": artifact.size_bytes}
        if name != "eager":
            found |= {f"{part}_speedup": 1 / rates[name][f"{part}_speedup"] for part in ("prefill", "decode")}
        if read := bytes_per_token(artifact.folder, artifact.entry):
            share = read * rates[name]["decode_tokens_per_s"] / bandwidth
            found |= {"bytes_per_token": read, "bandwidth_share": share}
        if options.windows:
            found["perplexity"] = perplexity_job(str(artifact.folder), artifact.model["ref"], options.windows)
            found["perplexity_ratio"] = found["perplexity"] / results.get("eager", found)["perplexity"]
        results[name] = found
    return {"model": options.model, "threads": threads, "read_bytes_per_s": bandwidth, "rounds": options.rounds,
            "windows": options.windows, "environment": environment(), "results": results}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--target", action="append", help=f"repeat it; without any {', '.join(TARGETS)}")
    parser.add_argument("--out", type=Path, help="where the artifacts lie or come to lie")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--windows", type=int, default=24, help="windows of the perplexity")
    parser.add_argument("--no-perplexity", dest="windows", action="store_const", const=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(options, options.out or Path(scratch)), indent=2))


if __name__ == "__main__":
    main()

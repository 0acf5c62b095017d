#!/usr/bin/env python
"""SparseGPT and GPTQ of llm-compressor on the model, windows and held-out text of prune_lm.py and quantize_lm.py.

    python scripts/bench/compress_peer.py sparsegpt 2:4 gptq --python PEER/bin/python --folder FOLDER

Prints one JSON document. PEER is an environment of its own with torch 2.13.0 and llmcompressor 0.14.0.1; FOLDER is the
model as prune_lm.py and quantize_lm.py write it with the same option. The seconds are those of `oneshot`,
the peaks those of the process's life until then, and perplexity is taken afterwards.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

METHODS = ("sparsegpt", "2:4", "gptq")


def texts() -> dict[str, list[list[int]]]:
    """Token ids of the windows: {"calibration": 32 of 512, "evaluation": 24 of 512}."""
    from quantize_lm import windows

    from deploytool.load.modelfile import read_model_file
    from deploytool.load.resolve import resolve

    return {"calibration": windows(), "evaluation": read_model_file(resolve("smollm2")).code._windows().tolist()}


def recipe(method: str) -> Any:
    """The peer's modifier for all linear layers but the head."""
    if method == "gptq":
        schemes = importlib.import_module("compressed_tensors.quantization")
        grid = schemes.QuantizationArgs(num_bits=4, type="int", strategy="group", group_size=64, symmetric=False)
        scheme = schemes.QuantizationScheme(targets=["Linear"], weights=grid)
        modifier = importlib.import_module("llmcompressor.modifiers.gptq").GPTQModifier
        return modifier(ignore=["lm_head"], config_groups={"all": scheme})
    modifier = importlib.import_module("llmcompressor.modifiers.pruning.sparsegpt").SparseGPTModifier
    structure = method if ":" in method else "0:0"
    return modifier(sparsity=0.5, mask_structure=structure, ignore=["lm_head"], targets=["Linear"])


def run(method: str, folder: Path, tokens: Path, threads: int) -> dict[str, Any]:
    """One method in this process, which is the peer's."""
    import torch
    import transformers
    from tokenizers import Tokenizer, models

    torch.set_num_threads(threads)
    windows = json.loads(tokens.read_text())
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = windows["calibration"]
    data = importlib.import_module("datasets").Dataset.from_dict(
        {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}
    )
    # it asks for a tokenizer, though the data are tokens
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), pad_token="-")
    modifier, oneshot = recipe(method), importlib.import_module("llmcompressor").oneshot
    started, used = time.perf_counter(), time.process_time()
    oneshot(model=model, dataset=data, recipe=modifier, processor=unused, num_calibration_samples=len(rows),
            max_seq_length=len(rows[0]))  # fmt: skip
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.no_grad():
        losses = [float(model(input_ids=ids, labels=ids).loss) for ids in torch.tensor(windows["evaluation"])[:, None]]
    versions = {name: importlib.import_module(name).__version__ for name in ("llmcompressor", "torch", "transformers")}
    return {"method": method, "perplexity": math.exp(sum(losses) / len(losses)), "seconds": seconds,
            "cpu_seconds": cpu_seconds, "peak_bytes": peak, "threads": threads, "versions": versions}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", choices=METHODS)
    parser.add_argument("--python", help="of the peer's environment")
    parser.add_argument("--folder", type=Path, required=True, help="the model as a Hugging Face folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tokens:  # the peer's process
        print(json.dumps(run(options.methods[0], options.folder, options.tokens, options.threads)))
        return
    if not options.python:
        parser.error("--python must name the peer's interpreter")
    with tempfile.TemporaryDirectory() as scratch:
        tokens = Path(scratch) / "tokens.json"
        tokens.write_text(json.dumps(texts()))
        results = [_child(method, tokens, options) for method in options.methods]
    print(json.dumps({"results": results}, indent=2))


def _child(method: str, tokens: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [options.python, __file__, method, "--folder", str(options.folder), "--tokens", str(tokens),
               "--threads", str(options.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


if __name__ == "__main__":
    sys.exit(main())

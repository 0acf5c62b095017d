#!/usr/bin/env python
"""A text encoder on this machine: every artifact against eager at several sizes, with its worst cosine.

    python scripts/bench/encoder_latency.py --model minilm --target ort --target ort-int8 > encoder.json
    taskset -c 0 python scripts/bench/encoder_latency.py --without SkipLayerNormFusion

Exports MODEL to every target (or takes what lies in --out), then times all of them and eager PyTorch in turns in one
process on as many threads as there are cores to run on, NumPy in and out, and prints medians and the median ratio of
each turn. `cpu` beside it are seconds of the process's CPU time: they say more where others keep the machine busy.
`cosine` is the worst row's over all cases recorded with the artifact. --without adds a variant of each ONNX artifact
whose session leaves these optimizers out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.target import load_target

TARGETS = ("ort", "ort-int8", "ort-weight-int8")
SIZES = ((1, 16), (1, 128))


def exported(model: str, target: str, out: Path) -> Path:
    """The artifact's folder, also of one whose figures are outside its profile's limits."""
    name = load_target(target).name  # of a profile's file too
    folders = [out / name, out / f"{name}.failed"]
    if not any(folder.is_dir() for folder in folders):
        command = [sys.executable, "-m", "deploytool", "export", model, "--target", target, "-o", str(out),
                   "--no-bench", "--overwrite", "--json"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if not any(folder.is_dir() for folder in folders):
            raise SystemExit(f"{target}: {done.stderr[-2000:]}")
    return next(folder for folder in folders if folder.is_dir())


def feeds_of(signature: Any, batch: int, length: int) -> dict[str, np.ndarray]:
    """Whole rows of token ids."""
    random = np.random.default_rng(0)
    given = {"input_ids": random.integers(1000, 20000, (batch, length))}
    return {name: given.get(name, np.ones((batch, length), np.int64) * (name == "attention_mask"))
            for name in signature.input_names}  # fmt: skip


def time_in_turns(runners: dict[str, Any], size: tuple[int, int], turns: int, runs: int) -> dict[str, Any]:
    """Milliseconds of a run, wall and CPU, and how much faster than eager in the same turn."""
    feeds = feeds_of(runners["eager"].signature, *size)
    wall: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    for runner in runners.values():
        for _ in range(3):
            runner.run(feeds)
    for turn in range(turns):
        for name in list(runners)[:: 1 if turn % 2 else -1]:
            runners[name].run(feeds)
            started, used = time.perf_counter(), time.process_time()
            for _ in range(runs):
                runners[name].run(feeds)
            wall[name].append((time.perf_counter() - started) / runs * 1e3)
            cpu[name].append((time.process_time() - used) / runs * 1e3)
    return {name: {"ms": statistics.median(wall[name]), "cpu_ms": statistics.median(cpu[name]),
                   "speedup": statistics.median(e / own for e, own in zip(wall["eager"], wall[name], strict=True)),
                   "cpu_speedup": statistics.median(e / own for e, own in zip(cpu["eager"], cpu[name], strict=True))}
            for name in runners}  # fmt: skip


def measure(options: argparse.Namespace, out: Path) -> dict[str, Any]:
    from deploytool.artifact import Artifact
    from deploytool.backends.base import open_artifact
    from deploytool.bench.environment import environment

    names = list(dict.fromkeys(["eager", *(options.target or TARGETS)]))
    artifacts = {name: Artifact.load(exported(options.model, name, out), check=False) for name in names}
    if options.without:
        artifacts |= {f"{name} without {', '.join(options.without)}":
                      replace(a, settings={**a.settings, "without": options.without})
                      for name, a in artifacts.items() if a.format == "onnx"}  # fmt: skip
    with ExitStack() as stack:
        runners = {name: stack.enter_context(open_artifact(artifact)) for name, artifact in artifacts.items()}
        sizes = {f"{b}x{n}": time_in_turns(runners, (b, n), options.turns, options.runs) for b, n in SIZES}
    figures: dict[str, Any] = {}
    for name in names:
        report = json.loads((artifacts[name].folder / "report.json").read_text(encoding="utf-8"))
        worst = min(found["cosine"] for found in report["parity"]["outputs"].values())
        figures[name] = {"cosine": worst, "quality": report["quality"], "size_bytes": artifacts[name].size_bytes}
    return {"model": options.model, "threads": len(os.sched_getaffinity(0)), "turns": options.turns, "sizes": sizes,
            "artifacts": figures, "environment": environment()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--target", action="append", help=f"repeat it; without any {', '.join(TARGETS)}")
    parser.add_argument("--without", action="append", default=[], help="an optimizer of ONNX Runtime; repeat it")
    parser.add_argument("--out", type=Path, help="where the artifacts lie or come to lie")
    parser.add_argument("--turns", type=int, default=11)
    parser.add_argument("--runs", type=int, default=10, help="of each artifact in each turn")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        print(json.dumps(measure(options, options.out or Path(scratch)), indent=2))


if __name__ == "__main__":
    main()

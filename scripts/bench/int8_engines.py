#!/usr/bin/env python
"""torch's engines for int8 side by side on artifacts of the backend fbgemm: CPU seconds, and the outputs' cosine.

    python scripts/bench/int8_engines.py out/fbgemm > engines.json

Each file is packed for every engine and run through deploytool's own runner on its recorded cases, on one thread, in
turns of random order in one process. `ratio` is the median over turns of an engine's CPU time over fbgemm's in the same
turn; `again` is fbgemm opened a second time: what its ratio is off 1 is noise. `cosine` is against fbgemm's outputs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.cases import Case, case_files
from deploytool.difference import cosine
from deploytool.runner import Runner
from deploytool.signature import Feeds

ENGINES = {"fbgemm": "fbgemm", "again": "fbgemm", "x86": "x86", "onednn": "onednn", "qnnpack": "qnnpack"}


def seconds(runner: Runner, feeds: Feeds, calls: int) -> float:
    """CPU time of one call."""
    start = time.process_time()
    for _ in range(calls):
        runner.run(feeds)
    return (time.process_time() - start) / calls


def compared(runners: dict[str, Runner], feeds: Feeds, turns: int, block: float) -> dict[str, Any]:
    """Every engine's figures on one case."""
    outputs = {name: [runner.run(feeds) for _ in range(4)][-1] for name, runner in runners.items()}  # it compiles first
    calls = max(1, int(block / max(seconds(runners["fbgemm"], feeds, 3), 1e-6)))
    times: dict[str, list[float]] = {name: [] for name in runners}
    order = np.random.default_rng(0)
    for _ in range(turns):
        for index in order.permutation(len(runners)):
            name = list(runners)[index]
            times[name].append(seconds(runners[name], feeds, calls))
    return {name: {
        "ms": round(1000 * statistics.median(found), 4),
        "ratio": round(statistics.median(a / b for a, b in zip(found, times["fbgemm"], strict=True)), 3),
        "cosine": round(min(cosine(outputs[name][key], right) for key, right in outputs["fbgemm"].items()), 6),
    } for name, found in times.items()}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+", type=Path)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--block", type=float, default=0.05, help="seconds of each turn and engine")
    options = parser.parse_args()
    for folder in options.artifacts:
        artifact = Artifact.load(folder, check=False)
        runners = {name: open_artifact(replace(artifact, settings={**artifact.settings, "engine": e, "threads": 1}))
                   for name, e in ENGINES.items() if e in torch.backends.quantized.supported_engines}  # fmt: skip
        for path in case_files(folder / "golden"):
            feeds = Case.load(path).inputs
            sizes = ["x".join(map(str, array.shape)) for array in feeds.values()]
            found = compared(runners, feeds, options.turns, options.block)
            print(json.dumps({"artifact": str(folder), "inputs": sizes, "engines": found}), flush=True)


if __name__ == "__main__":
    main()

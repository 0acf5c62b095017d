#!/usr/bin/env python
"""Memory and time of attention by blocks and of local windows against the full matrix, at growing lengths.

    python scripts/bench/attention.py

One head of width 64, batch 1, fp32. Memory is the growth of the process's peak while attention is computed, each case
in a process of its own. The slope is that of log(time) over log(length) from 1,024 to 16,384 tokens: 1 is linear, 2
quadratic.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from deploytool.load.attention_kernels import blockwise, sparse

WIDTH = 64
LENGTHS = (1024, 2048, 4096, 8192, 16384)
SCALE = WIDTH**-0.5


def matrix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The definition, with the whole matrix of scores."""
    return torch.softmax(q @ k.transpose(-2, -1) * SCALE, dim=-1) @ v


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "matrix": matrix,
    "blockwise 512": lambda q, k, v: blockwise(q, k, v, None, SCALE, 512, False),
    "window 256": lambda q, k, v: sparse(q, k, v, None, SCALE, 256, 0, 0, False),
    "window 256, 2 global tokens": lambda q, k, v: sparse(q, k, v, None, SCALE, 256, 0, 2, False),
    "window 64, stride 16": lambda q, k, v: sparse(q, k, v, None, SCALE, 64, 16, 0, False),
}


def inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 1, tokens, WIDTH, generator=generator) for _ in range(3)]


def peak_bytes(kind: str, tokens: int) -> int:
    """By how much the resident memory of this process grows at most in one call, its output included (Linux)."""
    KINDS[kind](*inputs(256))
    tensors = inputs(tokens)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten: VmHWM becomes VmRSS
    before = memory("VmRSS")
    KINDS[kind](*tensors)
    return memory("VmHWM") - before


def memory(field: str) -> int:
    """A field of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024


def seconds(kind: str, tokens: int, runs: int) -> float:
    """The fastest of some calls after one that warms up: the others waited for other work."""
    tensors = inputs(tokens)
    taken = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        KINDS[kind](*tensors)
        taken.append(time.perf_counter() - started)
    return min(taken[1:])


def slope(times: dict[int, float]) -> float:
    """Least-squares slope of log(seconds) over log(tokens)."""
    x, y = [math.log(n) for n in times], [math.log(t) for t in times.values()]
    centre_x, centre_y = statistics.mean(x), statistics.mean(y)
    return sum((a - centre_x) * (b - centre_y) for a, b in zip(x, y, strict=True)) / sum((a - centre_x) ** 2 for a in x)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="timed calls per length")
    parser.add_argument("--peak", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        if args.peak:
            print(peak_bytes(args.peak[0], int(args.peak[1])))
            return 0
        tensors = inputs(LENGTHS[-1])
        exact = scaled_dot_product_attention(*tensors)
        difference = float((KINDS["blockwise 512"](*tensors) - exact).abs().max())
        found = {}
        for kind in KINDS:
            times = {n: seconds(kind, n, args.runs) for n in LENGTHS if kind != "matrix" or n <= 8192}
            peaks = {n: int(subprocess.check_output([sys.executable, __file__, "--peak", kind, str(n)]))
                     for n in (4096, 16384)}  # fmt: skip
            found[kind] = {"seconds": times, "slope": slope(times), "peak_bytes": peaks}
            print(kind, found[kind], file=sys.stderr)
    largest = LENGTHS[-1]
    share = found["blockwise 512"]["peak_bytes"][largest] / found["matrix"]["peak_bytes"][largest]
    report = {"schema_version": "1.0", "width": WIDTH, "threads": 1, "kinds": found,
              "blockwise_difference_from_sdpa": difference, "blockwise_share_of_matrix_memory": share}  # fmt: skip
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

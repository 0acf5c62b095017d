"""The least time that a run can take on this machine, and the share of it that an artifact reaches.

Source: S. Williams, A. Waterman, D. Patterson, Roofline: an insightful visual performance model for multicore
architectures, 2009: time >= max(operations / peak rate, bytes / bandwidth).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_SIZE = 768  # of the square factors: large enough for BLAS to be near its peak, small enough to stay in a cache
_READ_BYTES = 256_000_000  # per thread: larger than caches
_TRIES = 5


class Machine:
    """Measures what this machine can do; lives in a worker in which BLAS is held to one thread."""

    def __init__(self, threads: int):
        rng = np.random.default_rng(0)
        self._factors = [rng.standard_normal((_SIZE, _SIZE), dtype=np.float32) for _ in range(threads)]
        self._blocks = [np.ones(_READ_BYTES // 8) for _ in range(threads)]

    def peaks(self) -> dict[str, float]:
        """`flops`: fp32 operations per second of matrix products on all threads; `read_bytes_per_s`: from memory.

        Both the best of a few tries: what disturbs makes them smaller, nothing makes them larger.
        """
        products = 3
        count = 2.0 * products * _SIZE**3 * len(self._factors)
        seconds = min(self._together(self._multiply) for _ in range(_TRIES))
        reading = min(self._together(self._read) for _ in range(_TRIES))
        return {"flops": count / seconds, "read_bytes_per_s": _READ_BYTES * len(self._blocks) / reading}

    def _together(self, work: Callable[[int], None]) -> float:
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(self._factors))]
        start = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return time.perf_counter() - start

    def _multiply(self, number: int) -> None:
        for _ in range(3):
            self._factors[number] @ self._factors[number]

    def _read(self, number: int) -> None:
        self._blocks[number].max()


def roofline(
    p50_ms: float, flop: int, weight_bytes: int, before: Mapping[str, float], after: Mapping[str, float]
) -> dict[str, Any]:
    """`floor_ms`: no fp32 engine that reads its weights from memory can take less; `share`: floor over measured time.

    `before` and `after` are the peaks around the timing; the better ones count, and `peaks` has both. An int8 engine,
    and one whose weights stay in a cache, can exceed a share of 1. `bound` says which of the two decides.
    """
    best = {name: max(peak, after[name]) for name, peak in before.items()}
    compute, memory = 1e3 * flop / best["flops"], 1e3 * weight_bytes / best["read_bytes_per_s"]
    floor = max(compute, memory)
    return {
        "flop": flop,
        "weight_bytes": weight_bytes,
        **best,
        "peaks": {"before": before, "after": after},
        "floor_ms": floor,
        "share": floor / p50_ms,
        "bound": "compute" if compute >= memory else "memory",
    }

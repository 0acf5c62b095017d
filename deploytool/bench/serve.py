"""What lives in a measured child process: one opened artifact, one recorded case, and the clock."""

from __future__ import annotations

import gc
import importlib
import resource
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.errors import InputRefused
from deploytool.runner import Runner
from deploytool.signature import Outputs

_OPENER = "deploytool.backends.base:open_as_used"
_REST_SECONDS = 0.5
_REST_STEP_SECONDS = 0.01


class Served:
    """An artifact, opened, with the inputs of one case. Arguments and results are JSON.

    `opener` names the function "module:function" that makes a runner from an artifact. `settings`, where given,
    replace those of the artifact.
    """

    def __init__(self, folder: str, case: str, settings: Mapping[str, Any] | None = None, opener: str = _OPENER):
        artifact = Artifact.load(Path(folder))
        artifact = replace(artifact, settings={**artifact.settings, **(settings or {})})
        self._cases: dict[str, Outputs] = {}
        self._feeds = self._loaded(case)
        module, _, function = opener.partition(":")
        start = time.perf_counter()
        self._runner: Runner = getattr(importlib.import_module(module), function)(artifact)
        self._runner.__enter__()
        self._load_s = time.perf_counter() - start
        self._runner.run(self._feeds)
        self._cold_start_s = time.perf_counter() - start

    def take(self, case: str) -> None:
        """Run the inputs of another case from now on; engines that adapt to a size do so untimed, at its first runs."""
        new = case not in self._cases
        self._feeds = self._loaded(case)
        if new:
            self.time_block(0.0, min_runs=3)

    def _loaded(self, case: str) -> Outputs:
        if case not in self._cases:
            self._cases[case] = Case.load(Path(case)).inputs
            if not self._cases[case]:
                raise InputRefused("DT313", f"a case to be timed must hold inputs (got none in {case})")
        return self._cases[case]

    def loading(self) -> dict[str, float]:
        """Seconds to open the artifact, the engine's import included, and milliseconds until the first answer."""
        return {"load_s": self._load_s, "cold_start_ms": self._cold_start_s * 1e3}

    def warm_up(self, seconds: float, max_runs: int) -> float:
        """Run for `seconds` or `max_runs`, at least twice; returns the fastest run's milliseconds.

        Twice, since opening ran once and TorchScript optimizes in the second and third run.
        """
        times = self.time_block(seconds, max_runs=max_runs, min_runs=2)
        self.device()
        return min(times)

    def time_block(self, seconds: float, max_runs: int = 100_000, min_runs: int = 1) -> list[float]:
        """Milliseconds of each run, for `seconds` or until `max_runs`; the garbage collector rests meanwhile."""
        run, feeds, clock = self._runner.run, self._feeds, time.perf_counter_ns
        times: list[int] = []
        gc.collect()
        gc.freeze()
        gc.disable()
        try:
            end = clock() + int(seconds * 1e9)
            while len(times) < min_runs or (len(times) < max_runs and clock() < end):
                start = clock()
                run(feeds)
                times.append(clock() - start)
        finally:
            gc.enable()
            gc.unfreeze()
        return [t / 1e6 for t in times]

    def rest(self) -> float:
        """Wait until the engine's idle threads sleep, at most half a second; returns the seconds waited.

        Thread pools spin after the last run (ONNX Runtime for 0.1 to 0.2 s, libgomp for 0.04 s) and would take cores
        from whoever is timed next.
        """
        start = time.perf_counter()
        quiet = 0
        while quiet < 2 and time.perf_counter() - start < _REST_SECONDS:
            used = time.process_time()
            time.sleep(_REST_STEP_SECONDS)
            quiet = quiet + 1 if time.process_time() - used < 0.1 * _REST_STEP_SECONDS else 0
        return time.perf_counter() - start

    def device(self) -> dict[str, float | None]:
        """Median milliseconds of a run since this was last asked, by the device's own clock; None where it has none."""
        asked = getattr(self._runner, "device_ms", None)
        return {"device_ms": asked() if asked else None}

    def memory(self) -> dict[str, int]:
        """The largest resident size that this process had so far."""
        return {"peak_rss_bytes": _peak_rss_bytes()}


class Guard:
    """A fixed piece of work that shows how fast the machine is at the moment.

    One matrix product per thread, at once: a neighbour on any of the cores shows. BLAS must be held to one thread
    by the environment (see THREAD_LIMITS), since its idle threads would spin into the next block.
    """

    def __init__(self, threads: int, size: int = 256, products: int = 3):
        rng = np.random.default_rng(0)
        self._factors = [rng.standard_normal((size, size), dtype=np.float32) for _ in range(threads)]
        self._products = products

    def kernel(self, repeats: int = 5) -> float:
        """Median milliseconds of the work."""
        return float(np.median([self._once() for _ in range(repeats)]))

    def _once(self) -> float:
        threads = [threading.Thread(target=self._multiply, args=(factor,)) for factor in self._factors]
        start = time.perf_counter_ns()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter_ns() - start) / 1e6

    def _multiply(self, factor: Any) -> None:
        for _ in range(self._products):
            factor @ factor


THREAD_LIMITS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def _peak_rss_bytes() -> int:
    # VmHWM starts anew with the program; ru_maxrss would still hold the parent's size from before exec.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

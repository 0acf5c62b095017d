"""What a measurement was taken on, and what else ran meanwhile. Nothing here identifies the host."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from deploytool.processor import processor

_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_tile", "amx_int8",
          "asimd", "asimddp", "i8mm", "bf16", "sve")  # fmt: skip
_PACKAGES = ("deploytool", "numpy", "torch", "onnx", "onnxruntime", "openvino", "nncf", "tensorrt", "tensorrt-rtx-cu13",
             "torchao", "executorch", "transformers")  # fmt: skip
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def environment() -> dict[str, Any]:
    """The machine and its software as data; values that cannot be read are None."""
    here = processor()
    return {
        "cpu": here.name or None,
        "cpu_flags": [flag for flag in _FLAGS if flag in here.flags],
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(),
        "cores_usable": usable_cores(),
        "cpu_quota_cores": _quota(),
        "governor": _text(_GOVERNOR),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.system(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "packages": _versions(),
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def usable_cores() -> int:
    """Logical cores that this process may run on."""
    return len(os.sched_getaffinity(0))


def _quota() -> float | None:
    """Cores that the control group grants; None without a limit."""
    quota, _, period = (_text(_QUOTA) or "max").partition(" ")
    return None if quota == "max" or not period else int(quota) / int(period)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class Usage:
    """A reading of the clocks: seconds of wall time, and CPU seconds of the machine and of the own processes."""

    wall: float
    busy: float
    stolen: float
    own: float


def usage(pids: Iterable[int]) -> Usage:
    """Read the clocks; `pids` are the processes that are measured, this one counts as own too."""
    cpu = psutil.cpu_times()
    stolen = float(getattr(cpu, "steal", 0.0))
    busy = float(cpu.user + cpu.system + getattr(cpu, "irq", 0.0) + getattr(cpu, "softirq", 0.0) + stolen)
    own = time.process_time() + sum(map(_own, pids))
    return Usage(time.monotonic(), busy + float(getattr(cpu, "nice", 0.0)), stolen, own)


def _own(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return float(times.user + times.system)


def between(start: Usage, end: Usage) -> dict[str, float]:
    """What else ran: cores kept busy by others on average, and cores taken by the hypervisor."""
    wall = max(end.wall - start.wall, 1e-9)
    others = (end.busy - start.busy) - (end.own - start.own)
    return {
        "foreign_load_cores": round(max(0.0, others / wall), 3),
        "steal_cores": round(max(0.0, (end.stolen - start.stolen) / wall), 3),
    }

"""Energy: of the processor, where the kernel tells it, and of NVIDIA GPUs, where their driver does."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

from deploytool.artifact import Artifact
from deploytool.errors import EnvironmentLacking

GPU_KEY = "gpu_joules_per_run"
_POWERCAP = Path("/sys/class/powercap")
_NVML = "libnvidia-ml.so.1"  # comes with the driver
_NVML_REASONS = {3: "not supported", 4: "no permission", 9: "the driver is not loaded"}


class Counter(Protocol):
    """Something that counts joules."""

    def lap(self) -> float:
        """Joules since the last call, or since the counter was opened."""
        ...


class Meter:
    """Joules that all processor packages have used; `root` is where the kernel shows its counters.

    Source: https://docs.kernel.org/power/powercap/powercap.html (`energy_uj` in microjoules, wrapping at
    `max_energy_range_uj`). Raises EnvironmentLacking where there is no counter, or it must not be read.
    """

    def __init__(self, root: Path = _POWERCAP):
        self._zones = _packages(root)
        self._wraps = [int(_text(zone / "max_energy_range_uj")) for zone in self._zones]
        if not self._zones:
            raise EnvironmentLacking("DT402", "energy counters must be readable (the kernel shows no RAPL zone here)",
                                     fix="measure on a machine with RAPL, outside of virtual machines")  # fmt: skip
        self._last = self._read()

    def lap(self) -> float:
        """Joules since the last call, or since the meter was made; over all packages."""
        now = self._read()
        used = sum((new - old) % wrap for new, old, wrap in zip(now, self._last, self._wraps, strict=True))
        self._last = now
        return used / 1e6

    def _read(self) -> list[int]:
        return [int(_text(zone / "energy_uj")) for zone in self._zones]


class GpuMeter:
    """Joules that all NVIDIA GPUs which the driver shows have used.

    Source: NVIDIA Management Library, `nvmlDeviceGetTotalEnergyConsumption` (millijoules since the driver was loaded;
    Volta and newer). GPUs refresh it every 20 to 100 ms
    (https://petsc.org/main/manualpages/Log/PetscLogGpuEnergyMeter), so shorter turns are told coarsely.

    Raises EnvironmentLacking where the library, a GPU or its counter is not there. `library` has the functions of NVML;
    the driver's where left out.
    """

    def __init__(self, library: Any = None):
        self._nvml = library or _driver_library()
        self._call("nvmlInit_v2")
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.pointer(count))
        if not count.value:
            raise _unreadable("NVML shows no GPU")
        self._devices = [self._device(index) for index in range(count.value)]
        self._last = self._read()

    def lap(self) -> float:
        """Joules since the last call, or since the meter was made; over all GPUs."""
        now = self._read()
        used, self._last = now - self._last, now
        return used / 1e3

    def _device(self, index: int) -> ctypes.c_void_p:
        handle = ctypes.c_void_p()
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.pointer(handle))
        return handle

    def _read(self) -> int:
        """Millijoules of all GPUs."""
        total = 0
        for handle in self._devices:
            energy = ctypes.c_ulonglong()
            self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.pointer(energy))
            total += energy.value
        return total

    def _call(self, name: str, *args: Any) -> None:
        """Call a function of NVML; each returns 0 or says why not."""
        function = getattr(self._nvml, name, None)
        if function is None:
            raise _unreadable(f"this driver's NVML has no {name}")
        code = function(*args)
        if code:
            raise _unreadable(f"{name} answered {code}" + (f", {_NVML_REASONS[code]}" if code in _NVML_REASONS else ""))


class MachineMeter:
    """Joules of all processor packages and, where their driver tells them, of all NVIDIA GPUs.

    Raises EnvironmentLacking as `Meter` does: work on a GPU that leaves the processors idle is to count whole, and so
    is work that leaves the GPU idle.
    """

    def __init__(self) -> None:
        gpus, _ = or_reason(GpuMeter, "NVML")
        self._counters: list[Counter] = [Meter(), *([gpus] if gpus else [])]

    def lap(self) -> float:
        """Joules since the last call, or since the meter was made."""
        return sum(counter.lap() for counter in self._counters)


def counters_for(artifacts: Iterable[Artifact]) -> tuple[dict[str, Counter | None], dict[str, str]]:
    """Counters by the key of what they give per run, and what the environment says of each: its name, or why not."""
    packages, energy = or_reason(Meter, "RAPL")
    gpus: Counter | None = None
    gpu_energy = "not read: nothing here runs on an NVIDIA GPU"
    if any(map(on_gpu, artifacts)):
        gpus, gpu_energy = or_reason(GpuMeter, "NVML")
    return {"joules_per_run": packages, GPU_KEY: gpus}, {"energy": energy, "gpu_energy": gpu_energy}


def or_reason(open_counter: Callable[[], Counter], name: str) -> tuple[Counter | None, str]:
    """An open counter and its name; None and why there is none where it cannot be read."""
    try:
        return open_counter(), name
    except EnvironmentLacking as error:
        return None, f"unavailable: {error.message}"


def on_gpu(artifact: Artifact) -> bool:
    """Whether an artifact runs on an NVIDIA GPU when it is opened here."""
    return artifact.format == "tensorrt" and artifact.executes


def _driver_library() -> Any:
    try:
        return ctypes.CDLL(_NVML)
    except OSError as error:
        raise _unreadable(f"{_NVML} cannot be loaded") from error


def _unreadable(got: str) -> EnvironmentLacking:
    return EnvironmentLacking("DT402", f"energy counters of NVIDIA GPUs must be readable ({got})",
                              fix="measure with NVIDIA's driver installed, on a GPU of Volta or newer")  # fmt: skip


def _packages(root: Path) -> list[Path]:
    """One zone for each package: two drivers may show the same one, and the whole platform has a zone of its own."""
    zones = [path for path in sorted(root.glob("*:*")) if path.name.count(":") == 1]
    named = {_text(zone / "name").strip(): zone for zone in zones if (zone / "energy_uj").exists()}
    return [zone for name, zone in sorted(named.items()) if name.startswith("package")]


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError as error:
        raise EnvironmentLacking("DT402", f"energy counters must be readable (got: {error.strerror})",
                                 fix="run as root, or allow reading energy_uj") from error  # fmt: skip

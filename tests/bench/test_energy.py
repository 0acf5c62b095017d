"""Energy counters: as the kernel shows them, in a folder of the test; and those of NVML, in an object like it."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest

from deploytool.bench import energy
from deploytool.bench.energy import GpuMeter, MachineMeter, Meter, or_reason
from deploytool.errors import EnvironmentLacking


def zone(root: Path, place: str, microjoules: int, name: str = "", wrap: int = 1_000_000) -> Path:
    folder = root / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text(f"{name or 'package-' + place[-1]}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    (folder / "max_energy_range_uj").write_text(f"{wrap}\n")
    return folder


def test_joules_of_all_packages(tmp_path: Path) -> None:
    """What all packages used since the last reading is told, over a counter that wraps; parts count once."""
    zone(tmp_path, "intel-rapl:0", 900_000)
    zone(tmp_path, "intel-rapl:1", 100_000)
    zone(tmp_path, "intel-rapl:0:0", 5)  # a part of package 0
    meter = Meter(tmp_path)
    zone(tmp_path, "intel-rapl:0", 100_000)
    zone(tmp_path, "intel-rapl:1", 400_000)
    zone(tmp_path, "intel-rapl:0:0", 900)
    assert meter.lap() == pytest.approx(0.5)
    assert meter.lap() == 0


def test_a_package_counts_once(tmp_path: Path) -> None:
    """What a second driver shows of the same package, and the platform that holds it, must not be added."""
    places = {"intel-rapl:0": "package-0", "intel-rapl:1": "psys", "intel-rapl-mmio:0": "package-0"}
    for place, name in places.items():
        zone(tmp_path, place, 0, name)
    meter = Meter(tmp_path)
    for place, name in places.items():
        zone(tmp_path, place, 200_000, name)
    assert meter.lap() == pytest.approx(0.2)


def test_without_counters(tmp_path: Path) -> None:
    """Where the kernel shows no counter, energy is refused as a matter of the machine, not told as zero."""
    with pytest.raises(EnvironmentLacking, match="no RAPL zone"):
        Meter(tmp_path)


class Nvml:
    """The functions of NVML that are used, with GPUs of the test; `fails` says which of them answers what."""

    def __init__(self, millijoules: list[int], fails: dict[str, int] | None = None):
        self.millijoules, self.fails = millijoules, fails or {}
        self.ready = False

    def nvmlInit_v2(self) -> int:  # noqa: N802 - NVML's name
        self.ready = True
        return self.fails.get("init", 0)

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802 - NVML's name
        count.contents.value = len(self.millijoules)
        return 0 if self.ready else 1

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802 - NVML's name
        handle.contents.value = 0x7F0000000000 + index.value  # wider than an int: a handle is a pointer
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, energy: Any) -> int:  # noqa: N802 - NVML's name
        energy.contents.value = self.millijoules[(handle.value or 0) - 0x7F0000000000]
        return self.fails.get("energy", 0)


def test_joules_of_all_gpus() -> None:
    """What all GPUs used since the last reading is told, in joules."""
    nvml = Nvml([5_000, 2**40])
    meter = GpuMeter(nvml)
    nvml.millijoules = [6_500, 2**40 + 500]
    assert meter.lap() == pytest.approx(2.0)
    assert meter.lap() == 0


@pytest.mark.parametrize(
    ("library", "reason"),
    [
        (Nvml([1], {"init": 9}), "nvmlInit_v2 answered 9, the driver is not loaded"),
        (Nvml([]), "NVML shows no GPU"),
        (Nvml([1], {"energy": 3}), "nvmlDeviceGetTotalEnergyConsumption answered 3, not supported"),
        (object(), "has no nvmlInit_v2"),
    ],
)
def test_without_a_counter_of_gpus(library: object, reason: str) -> None:
    """Without the driver, a GPU, its counter or the function, energy is refused with the reason, not told as zero."""
    with pytest.raises(EnvironmentLacking, match=re.escape(reason)):
        GpuMeter(library)


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where NVIDIA's library cannot be loaded, the reason names it."""
    monkeypatch.setattr(energy, "_NVML", "libno-such-nvml.so.1")
    counter, said = or_reason(GpuMeter, "NVML")
    assert counter is None and said.startswith("unavailable:") and "libno-such-nvml.so.1" in said


def test_the_whole_machine_counts_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors and GPUs are added where both are told; without a GPU it is the processors, without them nothing."""
    monkeypatch.setattr(Meter.__init__, "__defaults__", (tmp_path,))
    with pytest.raises(EnvironmentLacking, match="no RAPL zone"):
        MachineMeter()
    zone(tmp_path, "intel-rapl:0", 0)
    nvml = Nvml([1_000, 2_000])
    for library, joules in ((nvml, 0.3 + 1.5), (Nvml([]), 0.3)):
        zone(tmp_path, "intel-rapl:0", 0)
        monkeypatch.setattr(energy, "_driver_library", lambda library=library: library)
        meter = MachineMeter()
        zone(tmp_path, "intel-rapl:0", 300_000)
        nvml.millijoules = [2_000, 2_500]
        assert meter.lap() == pytest.approx(joules)

"""Energy counters, as the kernel shows them, in a folder of the test."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploytool.bench.energy import Meter
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

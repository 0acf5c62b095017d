"""Energy of the processor, where the kernel tells it: RAPL counters below /sys/class/powercap."""

from __future__ import annotations

from pathlib import Path

from deploytool.errors import EnvironmentLacking

_POWERCAP = Path("/sys/class/powercap")


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

    @classmethod
    def or_reason(cls) -> tuple[Meter | None, str]:
        """A meter and "RAPL"; None and why energy is unavailable where it cannot be read."""
        try:
            return cls(), "RAPL"
        except EnvironmentLacking as error:
            return None, f"unavailable: {error.message}"

    def lap(self) -> float:
        """Joules since the last call, or since the meter was made; over all packages."""
        now = self._read()
        used = sum((new - old) % wrap for new, old, wrap in zip(now, self._last, self._wraps, strict=True))
        self._last = now
        return used / 1e6

    def _read(self) -> list[int]:
        return [int(_text(zone / "energy_uj")) for zone in self._zones]


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

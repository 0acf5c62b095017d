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
        self._zones = sorted(path for path in root.glob("*:*") if path.name.count(":") == 1)
        self._zones = [zone for zone in self._zones if (zone / "energy_uj").exists()]
        self._wraps = [int((zone / "max_energy_range_uj").read_text()) for zone in self._zones]
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
        try:
            return [int((zone / "energy_uj").read_text()) for zone in self._zones]
        except OSError as error:
            raise EnvironmentLacking("DT402", f"energy counters must be readable (got: {error.strerror})",
                                     fix="run as root, or allow reading energy_uj") from error  # fmt: skip

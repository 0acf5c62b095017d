"""The processor that this runs on, as the system tells it: its name, its steps, what it can do."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_STEPS = ("cpu family", "model", "stepping")


@dataclass(frozen=True)
class Processor:
    """The first one, where there are several.

    name    such as "AMD EPYC 7763 64-Core Processor"; "" where the system tells none
    steps   family, model and stepping, such as "25.1.1": kernels may differ by them. "" where it tells none
    flags   abilities by Linux's names, such as "avx512_vnni", "asimddp"; empty where there is no /proc/cpuinfo
    """

    name: str
    steps: str
    flags: frozenset[str]


def processor() -> Processor:
    """Read anew at every call; nothing of it is an error."""
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    flags = fields.get("flags") or fields.get("features") or ""  # of x86, of ARM
    return Processor(fields.get("model name") or platform.processor(),
                     ".".join(fields[key] for key in _STEPS if key in fields), frozenset(flags.split()))  # fmt: skip

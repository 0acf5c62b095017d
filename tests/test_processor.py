"""What is read of the processor at hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploytool import processor as room
from deploytool.backends import measured
from deploytool.bench.environment import environment
from deploytool.processor import Processor, processor

X86 = """processor\t: 0
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC 7763 64-Core Processor
stepping\t: 1
flags\t\t: fpu avx2 fma

processor\t: 1
cpu family\t: 25
model\t\t: 99
model name\t: another
flags\t\t: fpu avx512_vnni
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp\nCPU implementer\t: 0x41\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (X86, Processor("AMD EPYC 7763 64-Core Processor", "25.1.1", frozenset({"fpu", "avx2", "fma"}))),
        (ARM, Processor("some ARM", "", frozenset({"fp", "asimd", "asimddp"}))),
        ("", Processor("some ARM", "", frozenset())),
        (None, Processor("some ARM", "", frozenset())),
    ],
    ids=["x86", "arm", "empty", "missing"],
)
def test_the_first_processor_is_told(
    text: str | None, expected: Processor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Name, steps and flags must be those of the first processor; what the system does not tell is no error."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(room, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(room.platform, "processor", lambda: "some ARM")
    assert processor() == expected
    about = environment()
    assert (about["cpu"], set(about["cpu_flags"])) == (expected.name, expected.flags - {"fpu", "fp"})
    assert measured._here() == expected.name + (f" ({expected.steps})" if expected.steps else "")


def test_it_is_read_in_one_place() -> None:
    """No other file of the package may read the system's list of processors."""
    package = Path(room.__file__).parent
    readers = [path.name for path in package.rglob("*.py") if re.search(r"Path\(.*cpuinfo", path.read_text())]
    assert readers == ["processor.py"]

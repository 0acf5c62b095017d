"""The least time of a run, from what the machine can do."""

from __future__ import annotations

import pytest

from deploytool.bench.roofline import Machine, roofline

PEAKS = {"flops": 1e11, "read_bytes_per_s": 1e10}


def test_the_slower_of_both_decides() -> None:
    """A run takes at least as long as its operations and as its bytes; the share is that over the measured time."""
    compute = roofline(20.0, int(1e9), int(5e7), PEAKS, PEAKS)
    assert (compute["floor_ms"], compute["bound"], compute["share"]) == (
        pytest.approx(10),
        "compute",
        pytest.approx(0.5),
    )
    memory = roofline(20.0, int(1e8), int(1e8), PEAKS, PEAKS)
    assert (memory["floor_ms"], memory["bound"]) == (pytest.approx(10), "memory")


def test_the_better_peaks_count() -> None:
    """What disturbs makes a peak smaller, before the timing or after it: the larger one counts, and both are told."""
    before, after = {"flops": 1e11, "read_bytes_per_s": 5e9}, {"flops": 5e10, "read_bytes_per_s": 1e10}
    found = roofline(20.0, int(1e9), int(5e7), before, after)
    assert (found["flops"], found["read_bytes_per_s"]) == (1e11, 1e10) and found["floor_ms"] == pytest.approx(10)
    assert found["peaks"] == {"before": before, "after": after}


def test_the_machine_is_measured() -> None:
    """Peaks are of this machine: more than a processor of the last century, less than there is."""
    peaks = Machine(threads=1).peaks()
    assert 1e8 < peaks["flops"] < 1e13 and 1e8 < peaks["read_bytes_per_s"] < 1e13

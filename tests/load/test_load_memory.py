"""Tensors that lie on disk, and pages that are let go: values stay what they are."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deploytool.load import memory
from deploytool.load.memory import drop_pages, give_back, on_disk

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the means")


def _lies_in_a_file(tensor: Tensor) -> bool:
    return any(low <= tensor.data_ptr() < high for low, high in memory._mapped_files())


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_a_tensor_on_disk_has_the_same_values_and_may_be_written_to(dtype: torch.dtype) -> None:
    """It must be mapped from a file without a name, equal the tensor, and keep what is written into it to itself."""
    tensor = torch.arange(3 * 2**18).reshape(3, -1).to(dtype)
    laid = on_disk(tensor)
    assert _lies_in_a_file(laid) and not _lies_in_a_file(tensor)
    assert laid.dtype == dtype and torch.equal(laid, tensor)
    assert not list(Path(tempfile.gettempdir()).glob("deploytool-weights-*"))
    laid.zero_()
    assert int(tensor[2, 5]) == int(torch.tensor(2 * 2**18 + 5).to(dtype)) and not laid.any()


def test_small_tensors_full_disks_and_too_many_files_leave_it_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be lost where no file can be written: the tensor itself must come back."""
    small, large = torch.randn(5), torch.randn(300, 300)
    assert on_disk(small) is small

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    def unmapped(*_: object, **__: object) -> None:
        raise RuntimeError("unable to mmap 360000 bytes from file: Cannot allocate memory (12)")

    with monkeypatch.context() as patch:
        patch.setattr(memory.tempfile, "NamedTemporaryFile", full)
        assert on_disk(large) is large
    monkeypatch.setattr(torch, "from_file", unmapped)
    assert on_disk(large) is large or sys.platform != "linux"


@linux
def test_dropped_pages_are_read_again(tmp_path: Path) -> None:
    """Tensors of a mapped file, written to or not, and tensors of no file must keep their values."""
    path = tmp_path / "weights"
    path.write_bytes(torch.arange(2**19, dtype=torch.float32).numpy().tobytes())
    clean, written = (torch.from_file(str(path), shared=False, size=2**19, dtype=torch.float32) for _ in range(2))
    written.mul_(2)
    free = torch.arange(2**19, dtype=torch.float32)
    assert _lies_in_a_file(clean) and _lies_in_a_file(written) and not _lies_in_a_file(free)
    drop_pages([clean, written, free, torch.zeros(3), torch.zeros(0)])
    assert torch.equal(clean, free) and torch.equal(written, 2 * free)


def test_giving_back_changes_nothing() -> None:
    """What is in use must stay as it is."""
    tensor = torch.arange(1000)
    give_back()
    assert torch.equal(tensor, torch.arange(1000))

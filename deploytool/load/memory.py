"""What this process holds in memory: giving back what nobody uses, and keeping on disk what is not used now.

Only Linux has the means; elsewhere nothing happens, and everything stays as it is.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
import tempfile
from collections.abc import Iterable

import torch
from torch import Tensor

_LINUX = sys.platform == "linux"
_PAGE_OUT = 21  # MADV_PAGEOUT
_LEAST = 2**18  # bytes: smaller tensors are not worth a file


def give_back() -> None:
    """Return what was freed to the system, where the C library keeps it: tens to hundreds of MB between two stages."""
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def drop_pages(tensors: Iterable[Tensor]) -> None:
    """Let go of the pages of tensors that lie in mapped files: they are read from the file when they are used again."""
    given = list(tensors)
    if not _LINUX or not given:
        return
    with contextlib.suppress(OSError, AttributeError):
        library, mapped = ctypes.CDLL(None), _mapped_files()
        for tensor in given:
            start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if start < stop and any(low <= start and stop <= high for low, high in mapped):
                library.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), _PAGE_OUT)


def on_disk(tensor: Tensor) -> Tensor:
    """The same values in a file of their own, without a name, of which memory holds what is looked at.

    The tensor itself where it is small, where it does not lie in the processor's memory, where the disk is full, or
    where no more files can be mapped.
    """
    if not _LINUX or tensor.nbytes < _LEAST or tensor.device.type != "cpu":
        return tensor
    try:
        with tempfile.NamedTemporaryFile(prefix="deploytool-weights-") as file:
            tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tofile(file)
            file.flush()
            found = torch.from_file(file.name, shared=False, size=tensor.numel(), dtype=tensor.dtype)
    except (OSError, RuntimeError):  # PyTorch raises the latter where a file cannot be mapped
        return tensor
    return found.view(tensor.shape)


def _mapped_files() -> list[tuple[int, int]]:
    """Address ranges of this process that are mapped from files."""
    found = []
    with open("/proc/self/maps", encoding="utf-8") as lines:
        for line in lines:
            span, _, _, _, inode, *_ = line.split(maxsplit=5)
            if inode != "0":
                low, high = span.split("-")
                found.append((int(low, 16), int(high, 16)))
    return found

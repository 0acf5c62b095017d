"""Teacher outputs on disk, row by row, so that the teacher runs once over data that comes again in another order.

One file per cache, records appended: key, shape, compressed values. A record that a crash cut off is dropped when the
file is opened. What is used for training is always what was stored, so that a second run has the same numbers.
"""

from __future__ import annotations

import errno
import hashlib
import math
import os
import struct
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deploytool.errors import IntegrityBroken
from deploytool.storage import writing

_HEAD = struct.Struct("<16sBI")  # key, number of axes, bytes of compressed values
Outputs = dict[str, Tensor]


class TeacherCache:
    """Rows of one teacher's outputs. `top_k` keeps the largest of the last axis, and what the others come to."""

    def __init__(self, folder: Path, teacher: str, outputs: tuple[str, ...], top_k: int | None = None):
        about = hashlib.sha256(repr((teacher, outputs, top_k)).encode()).hexdigest()[:16]
        self.path = folder / f"teacher-{about}-{os.environ.get('RANK', '0')}.rows"
        self.hits = self.misses = 0
        self._names, self._top_k = outputs, top_k
        with writing(self.path):
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+b", buffering=0)
        self._places = self._scan()

    def __call__(self, batch: Mapping[str, Tensor], inputs: tuple[str, ...], run: Callable[[], Outputs]) -> Outputs:
        """The outputs for a batch; `run` gives them where a row is new. Axis 0 of everything is the batch."""
        keys = {name: _keys(batch, inputs, name) for name in self._names}
        if any(key not in self._places for row in keys.values() for key in row):
            self.misses += 1
            made = run()  # of the whole batch: its rows alone could differ in the last bit
            for name in self._names:
                for key, row in zip(keys[name], made[name], strict=True):
                    if key not in self._places:
                        self._append(key, row)
        else:
            self.hits += 1
        return {name: torch.stack([self._read(key) for key in row]) for name, row in keys.items()}

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _append(self, key: bytes, row: Tensor) -> None:
        packed = zlib.compress(shortened(row.detach().float().cpu(), self._top_k), 1)
        record = _HEAD.pack(key, row.ndim, len(packed)) + struct.pack(f"<{row.ndim}I", *row.shape) + packed
        start = self._file.seek(0, os.SEEK_END)
        with writing(self.path):
            if self._file.write(record) != len(record):
                self._file.truncate(start)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        self._places[key] = start

    def _read(self, key: bytes) -> Tensor:
        self._file.seek(self._places[key])
        _, axes, size = _HEAD.unpack(self._file.read(_HEAD.size))
        shape = struct.unpack(f"<{axes}I", self._file.read(4 * axes))
        try:
            return lengthened(zlib.decompress(self._file.read(size)), shape, self._top_k)
        except (zlib.error, ValueError) as error:
            raise IntegrityBroken("DT601", f"{self.path} must hold what was written into it (got: {error})",
                                  fix="remove it: the teacher runs again") from error  # fmt: skip

    def _scan(self) -> dict[bytes, int]:
        """Where each record starts; the file is cut after the last whole one."""
        end = self._file.seek(0, os.SEEK_END)
        places: dict[bytes, int] = {}
        at = 0
        while at + _HEAD.size <= end:
            self._file.seek(at)
            key, axes, size = _HEAD.unpack(self._file.read(_HEAD.size))
            after = at + _HEAD.size + 4 * axes + size
            if after > end:
                break
            places[key], at = at, after
        self._file.truncate(at)
        return places


def _keys(batch: Mapping[str, Tensor], inputs: tuple[str, ...], output: str) -> list[bytes]:
    """A key for every row of the batch: what the teacher gets, and which output is meant."""
    rows = [[str(batch[name].dtype) + str(list(row.shape)) + output, row.contiguous().cpu().numpy().tobytes()]
            for name in inputs for row in batch[name]]  # fmt: skip
    count = len(rows) // len(inputs)
    parts = [[rows[i * count + row] for i in range(len(inputs))] for row in range(count)]
    return [hashlib.sha256(b"".join(about.encode() + data for about, data in part)).digest()[:16] for part in parts]


def shortened(row: Tensor, top_k: int | None) -> bytes:
    """A row [..., classes] as bytes: all of it, or the largest `top_k`, their places and the mean of the others.

    The mean is the logarithm of the others' mean exponential, so that the probabilities still sum to 1.
    """
    if top_k is None or top_k >= row.shape[-1]:
        return row.contiguous().numpy().tobytes()
    largest, places = row.topk(top_k, dim=-1)
    others = row.scatter(-1, places, -float("inf")).logsumexp(-1, keepdim=True) - math.log(row.shape[-1] - top_k)
    return torch.cat([largest, others], -1).numpy().tobytes() + places.to(torch.int32).numpy().tobytes()


def lengthened(data: bytes, shape: tuple[int, ...], top_k: int | None) -> Tensor:
    """The row that `shortened` made bytes of; classes that were dropped all get the mean."""
    if top_k is None or top_k >= shape[-1]:
        return torch.from_numpy(np.frombuffer(data, np.float32).reshape(shape).copy())
    rows = math.prod(shape[:-1])
    values = torch.from_numpy(np.frombuffer(data, np.float32, rows * (top_k + 1)).copy()).view(*shape[:-1], top_k + 1)
    places = torch.from_numpy(np.frombuffer(data, np.int32, offset=values.numel() * 4).copy()).view(*shape[:-1], top_k)
    return values[..., -1:].expand(shape).scatter(-1, places.long(), values[..., :-1])

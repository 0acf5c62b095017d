"""Checkpoints of training: one safetensors file each, whole or not at all, with the state of the loop in its header.

The format is safetensors' (8 bytes of header length, JSON, bytes of the tensors), written in a stream, so that saving
needs no second copy in memory; no pickle, so that reading runs no code.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from deploytool.errors import InputRefused, IntegrityBroken
from deploytool.storage import new_file

_KEPT = 2  # the newest checkpoints; the older of them serves when the newest is lost with its disk block
_STATE, _DIGEST = "state", "sha256"
_NAMES = {
    torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True)
class Saving:
    """Where checkpoints are kept, after how many optimizer steps each, and a text that tells trainings apart."""

    folder: Path
    every: int
    about: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the state of the loop as JSON data."""

    path: Path
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Path:
    """Write the checkpoint of a step and remove all but the newest two.

    Raises EnvironmentLacking when the disk is full; what was there before is untouched then.
    """
    path = folder / f"step-{step:09}.safetensors"
    header: dict[str, Any] = {"__metadata__": {_STATE: json.dumps(state, allow_nan=False), _DIGEST: sha256(tensors)}}
    offset = 0
    for name in sorted(tensors):
        size = tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": _NAMES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [offset, offset + size]}  # fmt: skip
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for stale in folder.glob(".step-*.tmp-*"):  # left by a process that was killed while it wrote
        stale.unlink(missing_ok=True)
    with new_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(tensors):
            _write(file, tensors[name])
    for old in _found(folder)[:-_KEPT]:
        old.unlink()
    return path


def latest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint; None where there is none. Raises IntegrityBroken when it is damaged."""
    found = _found(folder)
    if not found:
        return None
    try:
        with safe_open(found[-1], framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
        if sha256(tensors) != metadata[_DIGEST]:
            raise KeyError("the SHA-256 of its tensors differs")
        return Checkpoint(found[-1], tensors, json.loads(metadata[_STATE]))
    except (SafetensorError, KeyError, ValueError) as error:
        raise IntegrityBroken("DT601", f"{found[-1]} must be the checkpoint that was written (got: {error})",
                              fix=f"remove it: {_before(found)}") from error  # fmt: skip


def refuse_foreign(checkpoint: Checkpoint, wanted: Mapping[str, Any]) -> None:
    """Raise InputRefused unless the checkpoint was made by the same training of the same model, as `wanted` says."""
    made = checkpoint.state.get("training", {})
    different = [key for key in wanted if made.get(key) != wanted[key]]
    if different:
        raise InputRefused("DT315", f"{checkpoint.path.parent} must hold checkpoints of this training (got those of "
                           "another model or of other settings)",
                           detail=[f"{key}: {_short(made.get(key))} there, {_short(wanted[key])} here"
                                   for key in different],
                           fix="choose another folder for checkpoints, or remove this one")  # fmt: skip


class Digest:
    """SHA-256 over the names, types, shapes and bytes of tensors, mapping after mapping."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, tensors: Mapping[str, Any]) -> None:
        """What is no tensor, as a batch may hold, counts as it is printed."""
        for name in sorted(tensors):
            value = tensors[name]
            kind = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)
            self._digest.update(f"{name} {kind}\n".encode())
            if isinstance(value, Tensor):
                self._digest.update(_bytes(value))

    def hex(self) -> str:
        return self._digest.hexdigest()


def sha256(tensors: Mapping[str, Tensor]) -> str:
    """Hex SHA-256 over the names, types, shapes and bytes of tensors."""
    digest = Digest()
    digest.add(tensors)
    return digest.hex()


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(_bytes(tensor))


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _found(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.safetensors"))


def _before(found: list[Path]) -> str:
    return f"training goes on from {found[-2].name}" if len(found) > 1 else "training starts anew"


def _short(value: Any) -> str:
    return str(value) if len(str(value)) <= 60 else f"{str(value)[:57]}..."

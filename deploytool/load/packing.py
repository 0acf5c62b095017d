"""Tensors in fewer bytes, without loss: zeros as one bit each, and bytes of like meaning entropy-coded together.

A tensor is looked at as its bits. Where enough elements are zero in all bits, a bitmap says which are not, and only
those are stored. Their bytes are split into planes, all first bytes together, then all second ones: of trained floats
the byte with the exponent has few values and packs well, the others do not. Each part is stored as it is, by Huffman's
code alone, or as zlib packs it, whatever is least on a piece of it. Splitting bytes into planes: Masui et al., "A
compression scheme for radio data in high performance computing" (bitshuffle), Astronomy and Computing 2015, section 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deploytool.errors import InputRefused

_FEWEST_BYTES = 4096  # below, what is won does not pay
_FEWEST_ZEROS = 0.05  # a bitmap costs 1/32 of a float32 tensor
_WORTH = 0.97
_PIECE = 1 << 18
RAW, HUFFMAN, ZLIB = "raw", "huffman", "zlib"
_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Packed:
    """What must be known to unpack: type and shape, whether the first part is a bitmap, and (method, bytes) of each."""

    dtype: str
    shape: tuple[int, ...]
    bitmap: bool
    parts: tuple[tuple[str, int], ...]


def pack_tensor(tensor: Tensor) -> tuple[Tensor, Packed] | None:
    """The packed bytes, uint8 [n], and how they are packed; None where that would not be smaller by 3 %."""
    size = tensor.numel() * tensor.element_size()
    if size < _FEWEST_BYTES or tensor.element_size() not in _WORD:
        return None
    words = tensor.detach().contiguous().view(-1).view(_WORD[tensor.element_size()])
    there = words != 0
    bitmap = int(there.sum()) <= (1.0 - _FEWEST_ZEROS) * len(words)
    parts = [np.packbits(there.numpy(), bitorder="little").tobytes()] if bitmap else []
    kept = (words[there] if bitmap else words).view(torch.uint8).view(-1, tensor.element_size())
    parts += [plane.numpy().tobytes() for plane in kept.T.contiguous()]
    packed = [_smallest(part) for part in parts]
    if sum(len(data) for _, data in packed) > _WORTH * size:
        return None
    how = Packed(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), bitmap,
                 tuple((method, len(data)) for method, data in packed))  # fmt: skip
    return torch.frombuffer(bytearray(b"".join(data for _, data in packed)), dtype=torch.uint8), how


def unpack_tensor(name: str, data: Tensor, how: Packed) -> Tensor:
    """The tensor, bit for bit; raises InputRefused when the bytes are not what `how` says."""
    dtype = getattr(torch, how.dtype, None)
    if not isinstance(dtype, torch.dtype) or dtype.itemsize not in _WORD or any(n < 0 for n in how.shape):
        raise _damaged(name, f"type {how.dtype}, shape {list(how.shape)}")
    count = torch.Size(how.shape).numel()
    if len(how.parts) != dtype.itemsize + how.bitmap or data.dtype != torch.uint8 or data.ndim != 1:
        raise _damaged(name, f"{len(how.parts)} parts")
    parts, start = [], 0
    raw = memoryview(data.contiguous().numpy().tobytes())
    for method, length in how.parts:
        parts.append(_opened(name, method, raw[start : start + length], length, count))
        start += length
    if start != len(raw):
        raise _damaged(name, f"{len(raw)} bytes instead of {start}")
    words = torch.zeros(count, dtype=_WORD[dtype.itemsize])
    there = _bits(name, parts.pop(0), count) if how.bitmap else torch.ones(count, dtype=torch.bool)
    if any(len(part) != int(there.sum()) for part in parts):
        raise _damaged(name, "planes of another length than its values")
    if parts[0]:
        planes = torch.stack([torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts], dim=1)
        words[there] = planes.contiguous().view(_WORD[dtype.itemsize]).view(-1)
    return words.view(dtype).view(how.shape)


def pack_state(state: Mapping[str, Tensor], suffix: str) -> tuple[dict[str, Tensor], dict[str, Packed]]:
    """The state with packed bytes under `name + suffix` wherever that is smaller, and how each was packed."""
    stored, told = {}, {}
    for name, tensor in state.items():
        packed = pack_tensor(tensor)
        if packed is None:
            stored[name] = tensor
        else:
            stored[name + suffix], told[name] = packed
    return stored, told


def unpack_state(stored: Mapping[str, Tensor], told: Mapping[str, Packed], suffix: str) -> dict[str, Tensor]:
    """The state that `pack_state` was given; KeyError where bytes are missing."""
    taken = {name + suffix for name in told}
    state = {name: tensor for name, tensor in stored.items() if name not in taken}
    return state | {name: unpack_tensor(name, stored[name + suffix], how) for name, how in told.items()}


def _smallest(part: bytes) -> tuple[str, bytes]:
    """The part by the method that makes the least of a piece from its middle."""
    middle = max(0, (len(part) - _PIECE) // 2)
    piece = part[middle : middle + _PIECE]
    sizes = {method: len(_closed(method, piece)) for method in (RAW, HUFFMAN, ZLIB)}
    best = min(sizes, key=lambda method: sizes[method])
    data = _closed(best, part)
    return (best, data) if len(data) < len(part) else (RAW, part)


def _closed(method: str, part: bytes) -> bytes:
    if method == RAW:
        return part
    strategy = zlib.Z_HUFFMAN_ONLY if method == HUFFMAN else zlib.Z_DEFAULT_STRATEGY
    packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
    return packer.compress(part) + packer.flush()


def _opened(name: str, method: str, data: memoryview, length: int, count: int) -> bytes:
    if method not in (RAW, HUFFMAN, ZLIB) or len(data) != length or length < 0:
        raise _damaged(name, f"a part by {method!r} of {len(data)} instead of {length} bytes")
    if method == RAW:
        return bytes(data)
    opener = zlib.decompressobj()
    try:
        part = opener.decompress(data, count + 1)  # no part has more bytes than the tensor has elements
    except zlib.error as error:
        raise _damaged(name, str(error)) from error
    if not opener.eof or opener.unused_data:
        raise _damaged(name, "a part that does not end where it should")
    return part


def _bits(name: str, part: bytes, count: int) -> Tensor:
    if len(part) != -(-count // 8):
        raise _damaged(name, f"a bitmap of {len(part)} bytes for {count} elements")
    return torch.from_numpy(np.unpackbits(np.frombuffer(part, dtype=np.uint8), count=count, bitorder="little") != 0)


def _damaged(name: str, got: str) -> InputRefused:
    return InputRefused("DT314", f"the packed tensor {name!r} must be what its description says (got {got})",
                        fix="compress the model again")  # fmt: skip

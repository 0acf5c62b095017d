"""The folder that `compress` writes, which is a model again: `compressed.json` and `weights.safetensors`.

Zeros take a bit each, and bytes are entropy-coded where that is smaller (packing.py); what comes back is bit-identical.
A quantized weight is stored as its packed codes with scales and zero points, so that what comes back lies on its grid.
No code and no pickle: the original model is opened, the recorded edits are made again and the weights put in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from deploytool import shipped
from deploytool.encoding import Encoding
from deploytool.errors import (
    DeployError,
    EnvironmentLacking,
    InputRefused,
    IntegrityBroken,
    InternalError,
    UsageProblem,  # fmt: skip
)
from deploytool.load.grid import check_encoding, dequantize, fits, lies_on, pack, quantize, unpack
from deploytool.load.infer import refuse_non_finite
from deploytool.load.model import open_source
from deploytool.load.packing import Packed, pack_state, unpack_state
from deploytool.load.resolve import COMPRESSED
from deploytool.load.surgery import apply_edits, with_module
from deploytool.settings import Table
from deploytool.source import ModelRef, Source
from deploytool.storage import new_folder, read_json, sha256_file, write_json

WEIGHTS = "weights.safetensors"
SCHEMA_VERSION = "1.0"
_CODES, _SCALE, _ZERO_POINT, _PACKED = ":codes", ":scale", ":zero_point", ":packed"  # no parameter's name has a colon


class _Original(Table):
    kind: str
    name: str
    path: str


class _Encoding(Table):
    """`shape` and `dtype` are the weight's; its codes, scales and zero points are in the weights' file."""

    bits: int
    axis: int | None
    group: int
    shape: list[int]
    dtype: Literal["float32", "float16", "bfloat16"]


class _Part(Table):
    method: str
    size_bytes: int


class _Packed(Table):
    """As `packing.Packed`: how the bytes under the tensor's name and ":packed" are to be read."""

    dtype: str
    shape: list[int]
    bitmap: bool
    parts: list[_Part]


class _Document(Table):
    """`ties`: {name: name under which its tensor is stored}; `masked`: weights whose zeros must stay zero."""

    schema_version: Literal["1.0"]
    original: _Original
    original_sha256: str
    weights_sha256: str
    edits: list[dict[str, Any]]
    masked: list[str]
    encodings: dict[str, _Encoding] = Field(default_factory=dict)
    packed: dict[str, _Packed] = Field(default_factory=dict)
    ties: dict[str, str]
    signature: dict[str, Any]
    report: dict[str, Any]


def save_compressed(source: Source, original: Source, report: dict[str, Any], out: Path, *, overwrite: bool) -> None:
    """Write the folder of a compressed source, whole or not at all; the report in it tells `stored_bytes` too."""
    state, ties = _untied(source.module.state_dict())
    encodings = _encode(state, source.encodings)
    stored, packed = pack_state(state, _PACKED)
    with new_folder(out, overwrite=overwrite, marker=COMPRESSED) as folder:
        _write(stored, folder / WEIGHTS)
        (folder / WEIGHTS).chmod(0o644)
        ref = original.ref
        write_json(folder / COMPRESSED, {
            "schema_version": SCHEMA_VERSION,
            "original": {"kind": ref.kind, "name": ref.name, "path": ref.path},
            "original_sha256": state_sha256(original.module),
            "weights_sha256": sha256_file(folder / WEIGHTS),
            "edits": [dict(edit) for edit in source.edits],
            "masked": sorted(source.masks),
            "encodings": encodings,
            "packed": {name: _told(how) for name, how in packed.items()},
            "ties": ties,
            "signature": source.signature.to_json(),
            "report": {**report, "stored_bytes": (folder / WEIGHTS).stat().st_size},
        })  # fmt: skip


def _told(how: Packed) -> dict[str, Any]:
    parts = [{"method": method, "size_bytes": size} for method, size in how.parts]
    return {"dtype": how.dtype, "shape": list(how.shape), "bitmap": how.bitmap, "parts": parts}


def _meant(how: _Packed) -> Packed:
    return Packed(how.dtype, tuple(how.shape), how.bitmap, tuple((p.method, p.size_bytes) for p in how.parts))


def _write(stored: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(stored, path)
    except SafetensorError as error:  # it wraps the system's error, a full disk above all
        raise EnvironmentLacking("DT403", f"{path.parent.name} must be writable (got: {error})",
                                 fix="free some space, or choose another place with -o") from error  # fmt: skip


def open_compressed(ref: ModelRef) -> Source:
    """The Source in a folder; its samples, metrics and losses are the original model's."""
    folder = Path(ref.path)
    document = _read(folder / COMPRESSED)
    original = _open_original(document, folder)
    state, encodings = _load_weights(folder / WEIGHTS, document)
    apply_edits(original.module, document.edits)
    _fill(original.module, state)
    refuse_non_finite(original.module)
    return with_module(
        original, original.module, ref=ref, original=original.ref, edits=tuple(document.edits),
        masks={name: state[name] != 0 for name in document.masked}, encodings=encodings,
        dependencies=(folder / COMPRESSED, folder / WEIGHTS, *original.dependencies),
    )  # fmt: skip


def state_sha256(module: nn.Module) -> str:
    """Hex SHA-256 over the names, types, shapes and bytes of a module's state."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _untied(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Every distinct tensor once, and for the other names the one that they share."""
    stored: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise UsageProblem("DT204", f"the state of a compressed model must be tensors (got {name}: "
                               f"{type(tensor).__name__})")  # fmt: skip
        key = (tensor.data_ptr() or name, tensor.dtype, tensor.shape, tensor.stride())
        if first.setdefault(key, name) == name:
            stored[name] = tensor.detach().cpu().contiguous().clone()  # a copy: safetensors refuses overlapping views
        else:
            ties[name] = first[key]
    return stored, ties


def _encode(state: dict[str, Tensor], encodings: Mapping[str, Encoding]) -> dict[str, Any]:
    """Put packed codes in the place of every encoded weight; what the document says of them."""
    told = {}
    for name, encoding in encodings.items():
        weight = state.pop(name)
        if not lies_on(weight, encoding):
            raise InternalError("DT900", f"weight {name!r} must lie on its grid (it has been changed since)")
        state[name + _CODES] = pack(quantize(weight, encoding), encoding.bits)
        state[name + _SCALE], state[name + _ZERO_POINT] = encoding.scale, encoding.zero_point
        dtype = str(weight.dtype).removeprefix("torch.")
        told[name] = {**encoding.to_json(), "shape": list(weight.shape), "dtype": dtype}
    return told


def _decode(stored: dict[str, Tensor], told: Mapping[str, _Encoding]) -> dict[str, Encoding]:
    """Put every encoded weight in the place of its codes, and give its encoding."""
    encodings = {}
    for name, entry in told.items():
        packed, scale, zero = (stored.pop(name + part) for part in (_CODES, _SCALE, _ZERO_POINT))
        encoding = check_encoding(name, Encoding(entry.bits, entry.axis, entry.group, scale, zero))
        shape = torch.Size(entry.shape)
        if not fits(shape, encoding):
            raise InputRefused("DT314", f"the encoding of {name!r} must have a scale for every row and group of "
                               f"{entry.shape} (got {list(scale.shape)})")  # fmt: skip
        stored[name] = dequantize(unpack(packed, entry.bits, shape), encoding, getattr(torch, entry.dtype))
        encodings[name] = encoding
    return encodings


def _read(path: Path) -> _Document:
    try:
        return _Document.model_validate(read_json(path))
    except (ValidationError, ValueError, OSError) as error:
        raise InputRefused("DT314", f"{path} must describe a compressed model (got: {str(error)[:500]})",
                           fix="compress the model again, or with this version of deploytool") from error  # fmt: skip


def _open_original(document: _Document, folder: Path) -> Source:
    kind, name, path = document.original.kind, document.original.name, document.original.path
    moved = shipped.find("models", name, ".py") if kind == "python" and not Path(path).is_file() else None
    if kind == "python" and moved is None and not Path(path).is_file():
        raise InputRefused("DT301", f"the original model of {folder.name} must be at {path} (there is no such file)",
                           fix="put it back there, or compress the model again from where it is now")  # fmt: skip
    original = open_source(ModelRef(kind, name, str(moved) if moved else path))
    names = [[spec["name"] for spec in document.signature[side]] for side in ("inputs", "outputs")]
    if names != [list(original.signature.input_names), list(original.signature.output_names)]:
        raise _changed(folder, f"its inputs and outputs were {', '.join(names[0])} -> {', '.join(names[1])}")
    if state_sha256(original.module) != document.original_sha256:
        raise _changed(folder, "its weights are not those that were compressed")
    return original


def _changed(folder: Path, what: str) -> DeployError:
    return InputRefused("DT314", f"the original model of {folder.name} must be as it was then (it has changed)",
                        detail=[what], fix="compress the model again")  # fmt: skip


def _load_weights(path: Path, document: _Document) -> tuple[dict[str, Tensor], dict[str, Encoding]]:
    if not path.is_file() or sha256_file(path) != document.weights_sha256:
        raise IntegrityBroken("DT601", f"{path} must be the file that {COMPRESSED} names (missing or changed)")
    try:
        stored = unpack_state(load_file(path), {n: _meant(how) for n, how in document.packed.items()}, _PACKED)
        encodings = _decode(stored, document.encodings)
        state = {**stored, **{name: stored[owner] for name, owner in document.ties.items()}}
        missing = [name for name in document.masked if name not in state]
    except (SafetensorError, KeyError) as error:
        raise InputRefused("DT314", f"{path} must hold the weights that {COMPRESSED} lists (got: {error})") from error
    if missing:
        raise InputRefused("DT314", f"{path} must hold the masked weights (missing: {', '.join(missing)})")
    return state, encodings


def _fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Put the tensors in; names that share a tensor become one parameter again."""
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    made = {id(tensor): nn.Parameter(tensor, requires_grad=False) for name, tensor in state.items()
            if name in parameters}  # fmt: skip
    try:
        module.load_state_dict({n: made[id(t)] if n in parameters else t for n, t in state.items()}, assign=True)
    except RuntimeError as error:
        raise InputRefused("DT314", "the compressed weights must fit the original model's layers",
                           detail=str(error).splitlines()[1:11],
                           fix="the model has changed: compress it again") from error  # fmt: skip

"""From what the user typed to a ModelRef; nothing is loaded and nothing heavy is imported."""

from __future__ import annotations

import re
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import BinaryIO

from deploytool import shipped
from deploytool.artifact import BUNDLE, MANIFEST
from deploytool.errors import InputRefused, UsageProblem, nearest
from deploytool.source import ModelRef

COMPRESSED = "compressed.json"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CAN_RUN_CODE = {".pt2", ".pt", ".pth", ".ts", ".bin", ".ckpt", ".pkl"}
_GRAPH = 0x3A  # the tag of ModelProto.graph: field 7, of a length
# "Qwen2.5-1B" is no file name
_FILES = {*_CAN_RUN_CODE, ".py", ".onnx", ".safetensors", ".gguf", ".toml", ".json", ".tar", ".npz"}
_KINDS = ("a model is a shipped name (`deploytool models` lists them), a Python model file, an ONNX file, a Hugging "
          "Face folder or id, or a folder that `deploytool compress` wrote")  # fmt: skip


def resolve(text: str, samples: Path | None = None) -> ModelRef:
    """The model that `text` means: a shipped name, a model file, a folder, an ONNX file, or a Hugging Face id.

    `samples` is a file or folder of inputs for a model that brings none: an ONNX file. Raises UsageProblem for names
    and paths that do not exist, InputRefused for what is there and is no model.
    """
    ref = _resolve(text)
    if samples is None:
        return ref
    if ref.has_module:
        raise UsageProblem("DT201", "samples can be given for an ONNX file alone "
                           f"(got {ref.name}, which brings its own)",
                           fix="leave --samples out; samples() of a model file gives them")  # fmt: skip
    if not samples.exists():
        raise UsageProblem("DT201", f"samples must be an .npz file or a folder of such files (got {samples}, "
                           "which does not exist)", detail=neighbours(samples),
                           fix="write them with numpy.savez(file, **{input name: array})")  # fmt: skip
    return replace(ref, samples=str(samples.absolute()))


def _resolve(text: str) -> ModelRef:
    path = Path(text)
    found = shipped.find("models", text, ".py")  # before a folder of that name: ./NAME is the folder
    if found is not None:
        return _file(found.absolute())
    if path.is_dir():
        return _folder(path.absolute())
    if path.is_file():
        return _file(path.absolute())
    if _HUB_ID.fullmatch(text) and path.suffix not in _FILES and not path.parent.exists():
        return ModelRef("huggingface", text.split("/")[1], text)
    near = neighbours(path) if shipped.is_path(text) else [nearest(text, shipped.names("models", ".py"))]
    raise UsageProblem("DT201", "the model must be a shipped name, a file, a folder or a hub id "
                       f"(got {shipped.unfound(text)})", detail=near, fix=_KINDS)  # fmt: skip


def neighbours(path: Path) -> list[str]:
    """A sentence on what lies where a path that does not exist was looked for; none where that is nothing."""
    folder = path.parent
    while not folder.exists():
        path, folder = folder, folder.parent
    there = [str(other) for other in folder.iterdir() if not other.name.startswith(".")] if folder.is_dir() else []
    close = get_close_matches(str(path), there, n=1)
    return [f"did you mean {close[0]!r}?"] if close else []


def _file(path: Path) -> ModelRef:
    if path.suffix == ".py":
        return ModelRef("python", path.stem, str(path))
    if path.suffix in _CAN_RUN_CODE:
        raise InputRefused("DT312", f"{path.name} must be a model file in Python (a {path.suffix} file can run code "
                           "when loaded, and holds no samples)",
                           fix="write a model file with build() and samples() that loads the weights")  # fmt: skip
    if path.suffix == ".onnx":
        if not _is_whole_protobuf(path):
            raise InputRefused("DT307", f"{path.name} must be a whole ONNX file (it is cut, or something else)",
                               detail=[describe(path)],
                               fix="copy it again, or export it again with the tool that wrote it")  # fmt: skip
        return ModelRef("onnx", path.stem, str(path))
    if path.suffix == ".tar" or _is_tar(path):
        raise _built(f"{path.name}, a tar as bundles are")
    raise InputRefused("DT301", f"a model must be a Python model file, an ONNX file or a folder (got {path.name})",
                       detail=[describe(path)], fix=_KINDS)  # fmt: skip


def _folder(path: Path) -> ModelRef:
    if (path / COMPRESSED).is_file():
        return ModelRef("compressed", path.name, str(path))
    if (path / "config.json").is_file():
        return ModelRef("huggingface", path.name, str(path))
    for name, what in ((MANIFEST, "an artifact"), (BUNDLE, "a bundle"), (f"*/{MANIFEST}", "an export's output")):
        if any(path.glob(name)):
            raise _built(f"{path}, {what}")
    raise InputRefused("DT301", f"a model folder must hold config.json (Hugging Face) or {COMPRESSED} "
                       f"(written by `deploytool compress`) (got {path})",
                       detail=[f"it holds: {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"],
                       fix=_KINDS)  # fmt: skip


def _built(what: str) -> InputRefused:
    return InputRefused("DT301", f"a model must be what engines are built from (got {what}: its engines are built)",
                        detail=["verify, bench, check, package, inspect and report take it as it is"],
                        fix="name the model that it was exported from")  # fmt: skip


def describe(path: Path) -> str:
    """What the first bytes of a file say that it is."""
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        return "the file is empty"
    signs = {
        b"version https://git-lfs": "a Git LFS pointer: run `git lfs pull`",
        b"<!DOCTYPE": "a web page", b"<html": "a web page", b"\x1f\x8b": "a gzip archive",
        b"PK\x03\x04": "a zip archive (a PyTorch checkpoint?)", b"GGUF": "a GGUF file",
        b"\x08": "an ONNX file or other protobuf",
    }  # fmt: skip
    return "it looks like " + next((what for sign, what in signs.items() if head.startswith(sign)), "unknown data")


def _is_tar(path: Path) -> bool:
    """Whether a file begins with a tar's header, POSIX's or GNU's: both have `ustar` at byte 257."""
    with path.open("rb") as file:
        return file.read(262)[257:] == b"ustar"


def _is_whole_protobuf(path: Path) -> bool:
    """Whether a file's outermost fields are those of an ONNX model and end where it ends; nothing large is read.

    protobuf's wire format: a tag (field number * 8 + type), then a number (0), 8 bytes (1), a length and as many bytes
    (2), or 4 bytes (5).
    """
    size, graphs = path.stat().st_size, 0
    with path.open("rb") as file:
        while file.tell() < size:
            tag = _varint(file)
            number = _varint(file) if tag & 7 in (0, 2) else 0
            skip = {0: 0, 1: 8, 2: number, 5: 4}.get(tag & 7, -1)
            if tag < 0 or number < 0 or skip < 0:
                return False
            graphs += tag == _GRAPH
            file.seek(skip, 1)
        return file.tell() == size and graphs == 1


def _varint(file: BinaryIO) -> int:
    """The next number, least significant seven bits first; -1 where there is none."""
    number = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            return -1
        number |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return number
    return -1

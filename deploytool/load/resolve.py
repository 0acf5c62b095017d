"""From what the user typed to a ModelRef; nothing is loaded and nothing heavy is imported."""

from __future__ import annotations

import re
from pathlib import Path

from deploytool import shipped
from deploytool.errors import InputRefused, nearest
from deploytool.source import ModelRef

COMPRESSED = "compressed.json"
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_CAN_RUN_CODE = {".pt2", ".pt", ".pth", ".ts", ".bin", ".ckpt", ".pkl"}
_FILES = {*_CAN_RUN_CODE, ".py", ".onnx", ".safetensors", ".gguf", ".toml", ".json"}  # "Qwen2.5-1B" is no file name


def resolve(text: str) -> ModelRef:
    """The model that `text` means: a shipped name, a model file, a folder, or a Hugging Face id."""
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
    known = shipped.names("models", ".py")
    raise InputRefused("DT301", f"the model must be a shipped name, a file, a folder or a hub id (got {text!r})",
                       detail=[nearest(text, known)], fix="`deploytool models` lists the shipped ones")  # fmt: skip


def _file(path: Path) -> ModelRef:
    if path.suffix == ".py":
        return ModelRef("python", path.stem, str(path))
    if path.suffix in _CAN_RUN_CODE:
        raise InputRefused("DT312", f"{path.name} must be a model file in Python (a {path.suffix} file can run code "
                           "when loaded, and holds no samples)",
                           fix="write a model file with build() and samples() that loads the weights")  # fmt: skip
    if path.suffix == ".onnx":
        raise InputRefused("DT307", "a model must be given as its PyTorch module, which can be compressed and "
                           f"measured against (got {path.name})", detail=[describe(path)],
                           fix="write a model file with build() and samples()")  # fmt: skip
    raise InputRefused("DT301", f"a model must be a Python model file or a folder (got {path.name})",
                       detail=[describe(path)], fix="see docs/models.md for what a model file holds")  # fmt: skip


def _folder(path: Path) -> ModelRef:
    if (path / COMPRESSED).is_file():
        return ModelRef("compressed", path.name, str(path))
    if (path / "config.json").is_file():
        return ModelRef("huggingface", path.name, str(path))
    raise InputRefused("DT301", f"a model folder must hold config.json (Hugging Face) or {COMPRESSED} "
                       f"(written by `deploytool compress`) (got {path})",
                       detail=[f"it holds: {', '.join(sorted(p.name for p in path.iterdir())[:8]) or 'nothing'}"],
                       fix="name the folder that holds the model's config.json")  # fmt: skip


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

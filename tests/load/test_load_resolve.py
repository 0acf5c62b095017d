"""From what was typed to a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploytool.errors import InputRefused
from deploytool.load.resolve import resolve


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_names_files_and_folders(here: Path) -> None:
    """Shipped names, model files, Hugging Face folders, compressed folders and hub ids must be told apart."""
    (here / "m.py").write_text("")
    for folder, file in (("hf", "config.json"), ("small", "compressed.json")):
        (here / folder).mkdir()
        (here / folder / file).write_text("{}")
    assert (resolve("digits").kind, resolve("digits").name) == ("python", "digits")
    assert (resolve("m.py").kind, resolve("m.py").path) == ("python", str(here / "m.py"))
    assert resolve("./m.py") == resolve(str(here / "m.py")) == resolve("m.py")
    assert (resolve("hf").kind, resolve("hf").path) == ("huggingface", str(here / "hf"))
    assert resolve("small").kind == "compressed"
    (here / "m.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x3a\x0212")
    assert (resolve("m.onnx").kind, resolve("m.onnx").path) == ("onnx", str(here / "m.onnx"))
    for text in ("org/model", "Qwen/Qwen2.5-0.5B"):
        assert (resolve(text).kind, resolve(text).path) == ("huggingface", text)


def test_a_folder_does_not_hide_a_shipped_model(here: Path) -> None:
    """A bare name is a shipped model even where an export left a folder of that name; ./NAME is the folder."""
    (here / "digits").mkdir()
    assert resolve("digits").kind == "python"
    with pytest.raises(InputRefused, match="must hold config"):
        resolve("./digits")


@pytest.mark.parametrize(
    ("name", "content", "code", "sentence"),
    [
        ("empty.onnx", b"", "DT307", "the file is empty"),
        ("lfs.onnx", b"version https://git-lfs.github.com/spec/v1\n", "DT307", "Git LFS pointer"),
        ("page.onnx", b"<!DOCTYPE html>", "DT307", "a web page"),
        ("zip.onnx", b"PK\x03\x04", "DT307", "a zip archive"),
        ("cut.onnx", b"\x08\x0a\x12\x07pytorch\x3a\x0512", "DT307", "an ONNX file"),
        ("graphless.onnx", b"\x08\x0a\x12\x07pytorch", "DT307", "an ONNX file"),
        ("w.safetensors", b"\x00", "DT301", "unknown data"),
        ("w.gguf", b"GGUF", "DT301", "a GGUF file"),
        ("w.pt", b"PK\x03\x04", "DT312", "can run code"),
        ("w.pt2", b"PK\x03\x04", "DT312", "can run code"),
        ("w.bin", b"\x80", "DT312", "can run code"),
        ("data.zip", b"PK\x03\x04", "DT301", "a zip archive"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, code: str, sentence: str, here: Path) -> None:
    """A file that is no model file must be refused with what it seems to be."""
    (here / name).write_bytes(content)
    with pytest.raises(InputRefused) as caught:
        resolve(name)
    assert caught.value.code == code and sentence in str(caught.value)


@pytest.mark.parametrize("text", ["digts", "nowhere/m.py", "no such model", "", "a\nb", "ünknown", "a/b/c", "w.onnx"])
def test_nothing_is_refused(text: str) -> None:
    """What does not exist must be refused."""
    with pytest.raises(InputRefused):
        resolve(text)

"""From what was typed to a model."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

from deploytool.errors import InputRefused, UsageProblem
from deploytool.load.npz_samples import read_samples
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


@pytest.mark.parametrize("text", ["digts", "nowhere/m.py", "no such model", "a\nb", "ünknown", "a/b/c", "w.onnx"])
def test_what_does_not_exist_is_wrong_usage(text: str) -> None:
    """A name or path that does not exist must be a mistake of usage, like an unknown target; paths are said to be."""
    with pytest.raises(UsageProblem, match=r"a shipped name, a file, a folder or a hub id \(got ") as caught:
        resolve(text)
    assert caught.value.code == "DT201" and "an ONNX file" in str(caught.value.fix)
    assert ("which does not exist" in caught.value.message) == (text in ("nowhere/m.py", "a/b/c", "w.onnx"))


def test_the_nearest_is_named(here: Path) -> None:
    """A typing mistake must be answered with what is near: a shipped name, or what lies beside."""
    (here / "models").mkdir()
    (here / "models" / "my_model.py").write_text("")
    for text, near in (("digts", "digits"), ("models/my_modle.py", "models/my_model.py"), ("model/m.py", "models")):
        with pytest.raises(UsageProblem) as caught:
            resolve(text)
        assert caught.value.detail == (f"did you mean {near!r}?",)


def test_what_was_built_is_no_model(here: Path) -> None:
    """Bundles, artifacts and an export's output must be called so, with what takes them and what to name instead."""
    for folder, file in (("out/ort", "artifact.json"), ("bundle", "deploytool.json")):
        (here / folder).mkdir(parents=True)
        (here / folder / file).write_text("{}")
    with tarfile.open(here / "b.tar", "w") as tar:
        tar.add(here / "bundle", "bundle")
    (here / "renamed").write_bytes((here / "b.tar").read_bytes())
    kinds = {"out/ort": "an artifact", "out": "an export's output", "bundle": "a bundle"}
    kinds |= dict.fromkeys(("b.tar", "renamed"), "a tar as bundles are")
    for text, what in kinds.items():
        with pytest.raises(InputRefused, match=f"{text}, {what}: its engines are built") as caught:
            resolve(text)
        assert caught.value.code == "DT301" and "verify, bench" in caught.value.detail[0]
        assert caught.value.fix == "name the model that it was exported from"


def test_samples_that_do_not_exist_are_wrong_usage(here: Path) -> None:
    """The path must be said not to exist, not to be of a wrong kind."""
    (here / "m.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch\x3a\x0212")
    (here / "inputs.npz").write_bytes(b"")
    with pytest.raises(UsageProblem, match=r"\(got input\.npz, which does not exist\)") as caught:
        resolve("m.onnx", Path("input.npz"))
    assert caught.value.detail == ("did you mean 'inputs.npz'?",)
    (here / "empty").mkdir()
    with pytest.raises(InputRefused, match="a folder without any"):
        read_samples(here / "empty", [])

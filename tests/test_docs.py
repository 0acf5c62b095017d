"""Runs every example of the README and the documentation, and compares their tables with what the code knows.

A document's blocks run in one empty folder, in their order: `console` lines after `$`, `bash` scripts, `python` files.
A Python or TOML block whose first line is a comment with a file name is written to that file. A comment
`<!-- no-run: why -->` before a block leaves it out.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deploytool import shipped
from deploytool.backends.base import BACKENDS, load_checked_target
from deploytool.compress.recipe import load_recipe, step_tables
from deploytool.target import target_names

CHECKOUT = Path(__file__).parents[1]
CLI = CHECKOUT / "docs" / "cli.md"
DOCUMENTS = [CHECKOUT / "README.md", CHECKOUT / "CONTRIBUTING.md", *sorted((CHECKOUT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(<!-- no-run: [^>]+ -->\n)?```(console|bash|python|toml)\n(.*?)```", re.DOTALL)
FENCE = re.compile(r"^```(\S*)", re.MULTILINE)


class Block(NamedTuple):
    skipped: bool
    language: str
    text: str

    @property
    def file(self) -> str | None:
        """The file that the first line names."""
        named = re.match(r"# (\S+\.(?:py|toml))\n", self.text)
        return named[1] if named else None


def blocks(document: Path) -> list[Block]:
    found = BLOCK.findall(document.read_text(encoding="utf-8"))
    return [Block(bool(skip), language, text) for skip, language, text in found]


def _run(command: list[str], folder: Path) -> None:
    here = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{here}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command[-1]} gave {done.returncode}\n{done.stdout}\n{done.stderr}"


def _check_toml(path: Path) -> None:
    if "[parity]" in path.read_text(encoding="utf-8"):
        load_checked_target(str(path))
    else:
        load_recipe(path)


def _follow(block: Block, folder: Path) -> None:
    if block.file:
        (folder / block.file).write_text(block.text, encoding="utf-8")
    if block.language == "toml":
        assert block.file, f"a TOML block must name its file in its first line:\n{block.text}"
        _check_toml(folder / block.file)
    elif block.language == "python":
        _run([sys.executable, "-c", block.text], folder)
    elif block.language == "bash":
        _run(["bash", "-euo", "pipefail", "-c", block.text], folder)
    else:
        for command in re.findall(r"^\$ (.*)$", block.text, re.MULTILINE):
            _run(["bash", "-euo", "pipefail", "-c", command], folder)


def _follow_all(document: Path, folder: Path) -> None:
    for module in ("torch", "onnxruntime", "sklearn"):
        pytest.importorskip(module)
    for block in blocks(document):
        if not block.skipped:
            _follow(block, folder)


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != CLI], ids=lambda path: path.name)
def test_examples_run(document: Path, tmp_path: Path) -> None:
    """Every example must do what a reader who follows the page expects: end with exit code 0."""
    _follow_all(document, tmp_path)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_example_escapes(document: Path) -> None:
    """Every fenced block must be of a language that is run, or a directive of the page."""
    fences = FENCE.findall(document.read_text(encoding="utf-8"))
    known = {"console", "bash", "python", "toml", "{toctree}"}
    assert set(fences[::2]) <= known and set(fences[1::2]) <= {""}


def test_a_wrong_example_is_found(tmp_path: Path) -> None:
    """A command that fails, a Python error and a profile with an unknown key must each be reported."""
    profile = "# x.toml\nname='x'\ndescription=''\nbackend='eager'\nprecision='fp32'\n[parity]\ncosine_mni=1\n"
    bad = [("console", "$ deploytool explain DT999\n"), ("python", "raise ValueError\n"), ("toml", profile)]
    for language, text in bad:
        with pytest.raises((AssertionError, Exception), match=r"gave|cosine_min|DT202"):
            _follow(Block(False, language, text), tmp_path)


def _text(name: str) -> str:
    return (CHECKOUT / "docs" / name).read_text(encoding="utf-8")


def test_the_tables_are_complete() -> None:
    """Every target, backend, build setting, compression step with its settings, model and recipe must be documented."""
    targets, compress, models = _text("targets.md"), _text("compress.md"), _text("models.md")
    assert [n for n in target_names() if f"| `{n}` |" not in targets] == []
    keys = {key for backend in BACKENDS.values() for key in backend.table.model_fields}
    assert [k for k in {*BACKENDS, *keys} if f"`{k}`" not in targets] == []
    assert [n for n in shipped.names("models", ".py") if f"| `{n}` |" not in models] == []
    assert [n for n in shipped.names("models/recipes", ".toml") if f"`{n}`" not in compress] == []
    compress += _text("training.md")
    settings = {key for table in step_tables().values() for key in table.model_fields} - {"step"}
    assert [n for n in step_tables() if f"| `{n}` |" not in compress] == []
    assert [k for k in settings if f"`{k}`" not in compress] == []


def _paths(data: Any, path: str = "") -> Iterator[str]:
    """Every leaf's path, names that the model or the machine chooses replaced by NAME."""
    if isinstance(data, Mapping):
        chosen = re.search(r"(outputs|sizes|quality|against|packages|block_medians_ms|by_precision|delegated)$", path)
        for key, value in data.items():
            yield from _paths(value, f"{path}.{'NAME' if chosen else key}".lstrip("."))
    elif isinstance(data, list) and data and isinstance(data[0], Mapping):
        for value in data:
            yield from _paths(value, f"{path}[]")
    else:
        yield path


def test_the_reference_of_the_command_line_is_complete(tmp_path: Path) -> None:
    """Its examples must run, and every key of the report that they write must be explained there."""
    _follow_all(CLI, tmp_path)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    told = set(re.findall(r"`([\w.\[\]]+)`", CLI.read_text(encoding="utf-8")))
    words = {word for name in told for word in re.split(r"[.\[\]]+", name)}
    paths = {path.replace("targets[].", "") for path in _paths(report)}
    assert len(paths) > 60
    assert {path for path in paths if not set(re.split(r"[.\[\]]+", path)) - {""} <= words} == set()


def test_links_between_pages_lead_somewhere() -> None:
    """A relative link must name a file that exists."""
    for document in [*DOCUMENTS, CHECKOUT / "CHANGELOG.md"]:
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            assert "://" in link or (document.parent / link).exists(), f"{document.name}: {link}"

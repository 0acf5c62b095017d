"""`deploytool report` on every document that deploytool prints, and on those that it does not."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from deploytool.cli.main import run
from deploytool.results import Finding, Verdict

TARGET: dict[str, Any] = {
    "target": "ort", "status": "failed", "reason": "<script>alert(1)</script> & \"more\"", "precision": "fp32",
    "size_bytes": 1_500_000, "executed": True, "parity": {"outputs": {"a": {"cosine": 0.5, "max_abs": 1.0}}},
}  # fmt: skip
REPORT: dict[str, Any] = {"schema_version": "1.0", "model": "<b>tiny</b>",
                          "environment": {"cpu": "a <cpu>", "cores": 2}, "targets": [TARGET]}  # fmt: skip
VERDICT = Verdict((Finding("size", "ort", "pass", "smaller", 0.9, 1.05),
                   Finding("quality", "ort", "fail", "<i>less</i>")))  # fmt: skip
DOCUMENTS = {"export": REPORT, "artifact": {"schema_version": "1.0", **TARGET}, "verdict": VERDICT.to_json()}
MEASURED = {"parameters": 12, "nonzeros": 10, "size_bytes": 48, "metrics": {"accuracy": 0.5}}
TRAINED: dict[str, Any] = {
    "step": "distill<i>", "seconds": 1.5, "after": MEASURED, "loss_first": 2.0, "loss_last": 0.5,
    "loss_curve": [[1, 2.0], [2, 1.0], [4, 0.5]], "train_seconds": 1.0, "optimizer_steps": 4, "items_per_second": 8.0,
    "resumed_from": 0, "skipped": [{"layer": "a", "reason": "no <b>matrix</b>"}] * 2,
}  # fmt: skip
COMPRESSION: dict[str, Any] = {"schema_version": "1.0", "model": "<b>tiny</b>", "recipe": "mine.toml", "seed": 0,
                               "before": MEASURED, "steps": [TRAINED]}  # fmt: skip
WRONG: dict[str, Any] = {
    "a loss that is no number": {**COMPRESSION, "steps": [{**TRAINED, "loss_curve": [[1, "x"]]}]},
    "no losses": {**COMPRESSION, "steps": [{**TRAINED, "loss_curve": []}]},
    "a step without figures": {**COMPRESSION, "steps": [{"step": "rtn", "seconds": 1.0}]},
    "no object": [], "number": 3, "nothing": {}, "no targets": {"schema_version": "1.0"},
    "targets are a number": {"targets": 3}, "no target": {"targets": [{"x": 1}]},
    "versioned number": {**REPORT, "targets": 3}, "versioned no target": {**REPORT, "targets": [{"x": 1}]},
    "no result": {**REPORT, "targets": []}, "newer": {**REPORT, "schema_version": "2.0"},
    "words for figures": {**REPORT, "targets": [{**TARGET, "size_bytes": "large"}]},
    "parity is a list": {**REPORT, "targets": [{**TARGET, "parity": [1]}]},
    "infinite": {**REPORT, "targets": [{**TARGET, "size_bytes": float("inf")}]},
    "half a character": {**REPORT, "model": "\ud800"},
    "finding is text": {**VERDICT.to_json(), "findings": ["fail"]},
    "unknown field": {**VERDICT.to_json(), "findings": [{**VERDICT.findings[0].to_json(), "x": 1}]},
    "verdict that does not follow": {**VERDICT.to_json(), "status": "passed"},
}  # fmt: skip


class _Page(HTMLParser):
    """Which tags a page has, and what loads or runs something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.reaching: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.reaching += [name for name, _ in attrs if name in ("src", "href") or name.startswith("on")]


@pytest.mark.parametrize("form", ["table", "markdown", "html", "json"])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_document_is_rendered(name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Reports of exports and of single artifacts, and verdicts, are shown with their target in every format."""
    if form == "html":
        pytest.importorskip("jinja2")
    (tmp_path / "d.json").write_text(json.dumps(DOCUMENTS[name]))
    assert run(["report", str(tmp_path / "d.json"), "--format", form]) == 0
    printed = capsys.readouterr().out
    assert "ort" in printed and ("verdict: failed" in printed) == (name == "verdict" and form != "json")
    if form == "json":
        assert json.loads(printed).items() >= DOCUMENTS[name].items()


@pytest.mark.parametrize("form", ["table", "json"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_document_is_refused(name: str, form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no report and no verdict ends as refused input with one message, not as a crash or an empty table."""
    (tmp_path / "d.json").write_text(json.dumps(WRONG[name]))
    assert run(["report", str(tmp_path / "d.json"), "--format", form]) == 3
    told = capsys.readouterr()
    assert "error[DT309]" in told.err and told.out == ""


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_no_json_is_refused(content: bytes, tmp_path: Path) -> None:
    """An empty, truncated, binary or endlessly nested file is refused input."""
    (tmp_path / "d.json").write_bytes(content)
    assert run(["report", str(tmp_path / "d.json")]) == 3


def test_html_is_one_page_without_foreign_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page loads and runs nothing, and what a report says stands there as text."""
    pytest.importorskip("jinja2")
    for name, document in DOCUMENTS.items():
        (tmp_path / "d.json").write_text(json.dumps(document))
        assert run(["report", str(tmp_path / "d.json"), "--format", "html"]) == 0
        text = capsys.readouterr().out
        page = _Page(text)
        assert page.reaching == [] and not {"script", "b", "i", "link", "img", "iframe", "cpu"} & set(page.tags), name
        assert page.tags.count("table") == 1 and text.startswith("<!doctype html>")
    assert "&lt;i&gt;less&lt;/i&gt;" in text


@pytest.mark.parametrize("folder", [False, True])
def test_a_compression_is_rendered(folder: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `compress` printed, or its folder, must be shown step by step, with the losses of what trained."""
    file = tmp_path / "compressed.json"
    kept = {"schema_version": "1.0", "weights_sha256": "0", "report": COMPRESSION} if folder else COMPRESSION
    file.write_text(json.dumps(kept))
    for form in ("table", "markdown"):
        assert run(["report", str(tmp_path if folder else file), "--format", form]) == 0
        printed = capsys.readouterr().out
        assert "2 -> 0.5" in printed and "accuracy 0.5" in printed and "2 left as they were" in printed


def test_html_draws_the_losses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The drawing must go from the first, highest loss at the left top to the last, lowest one at the right bottom."""
    pytest.importorskip("jinja2")
    (tmp_path / "d.json").write_text(json.dumps(COMPRESSION))
    assert run(["report", str(tmp_path / "d.json"), "--format", "html"]) == 0
    text = capsys.readouterr().out
    page = _Page(text)
    assert page.tags.count("polyline") == 1 and not {"i", "b", "script"} & set(page.tags) and page.reaching == []
    points = [tuple(map(float, point.split(","))) for point in text.partition('points="')[2].partition('"')[0].split()]
    assert points == [(4.0, 4.0), (214.7, 118.7), (636.0, 176.0)]


def test_html_without_its_package_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where jinja2 is missing the other formats work, and HTML ends as a lacking environment with the pip line."""
    monkeypatch.setitem(sys.modules, "jinja2", None)
    monkeypatch.delitem(sys.modules, "deploytool.report.html", raising=False)
    (tmp_path / "d.json").write_text(json.dumps(REPORT))
    assert run(["report", str(tmp_path / "d.json"), "--format", "html"]) == 4
    told = capsys.readouterr()
    assert "error[DT401]" in told.err and "pip install 'deploytool[report]'" in told.err and told.out == ""
    assert run(["report", str(tmp_path / "d.json"), "--format", "markdown"]) == 0


@pytest.mark.parametrize("form", ["table", "markdown", "html", "json"])
def test_a_report_is_written_to_a_file(form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With -o the file must hold what is printed without; one that exists must stay unless --overwrite is given."""
    if form == "html":
        pytest.importorskip("jinja2")
    (tmp_path / "d.json").write_text(json.dumps(next(iter(DOCUMENTS.values()))))
    asked = ["report", str(tmp_path / "d.json"), "--format", form]
    assert run(asked) == 0
    printed = capsys.readouterr().out
    out = tmp_path / "new" / "r.txt"
    assert run([*asked, "-o", str(out)]) == 0
    assert capsys.readouterr().out == "" and out.read_text() == printed
    out.write_text("mine")
    assert run([*asked, "-o", str(out)]) == 2
    assert "error[DT203]" in capsys.readouterr().err and out.read_text() == "mine"
    assert run([*asked, "-o", str(out), "--overwrite"]) == 0
    assert out.read_text() == printed and [p.name for p in out.parent.iterdir()] == ["r.txt"]


def test_a_report_does_not_replace_a_folder(tmp_path: Path) -> None:
    """A folder must be refused as the output, an empty one and with --overwrite too."""
    (tmp_path / "d.json").write_text(json.dumps(next(iter(DOCUMENTS.values()))))
    (tmp_path / "f").mkdir()
    assert run(["report", str(tmp_path / "d.json"), "-o", str(tmp_path / "f"), "--overwrite"]) == 2

"""Reports and verdicts as text and Markdown."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from deploytool.report.markdown import check_markdown, export_markdown
from deploytool.report.table import check_table, export_table
from deploytool.results import Finding, Verdict

REPORT: dict[str, Any] = {
    "schema_version": "1.0", "model": "tiny", "environment": {"cpu": "some <cpu>", "cores": 2, "load": [1.0]},
    "targets": [
        {"target": "ort", "status": "ok", "reason": None, "precision": "fp32", "size_bytes": 90_500_000,
         "executed": True, "parity": {"passed": True, "cases": 3, "outputs": {
             "a": {"cosine": 0.999999, "max_abs": 1e-6}, "b": {"cosine": 0.9981, "max_abs": 2.5e-3}}},
         "quality": {"accuracy": {"reference": 0.98, "candidate": 0.97, "lower_is_better": False}},
         "generation": {"agreement": 1.0}, "memory": {"peak_rss_bytes": 250_000_000}, "findings": [],
         "speed": {"p50_ms": 12.3456, "speedup": 1.6181, "speedup_ci": [1.55, 1.7], "verdict": "faster"}},
        {"target": "ort-int8", "status": "ok", "precision": "int8", "size_bytes": 1, "executed": False,
         "parity": None, "quality": {}, "speed": None, "memory": None,
         "findings": ["ort-int8 is slower than the plain ort"]},
        {"target": "trt", "status": "unavailable", "reason": "no such\npackage \x1b[31m\u00e9"},
    ],
}  # fmt: skip
VERDICT = Verdict((
    Finding("size", "ort", "pass", "the size is 1 % smaller", 0.99, 1.05),
    Finding("quality", "ort accuracy", "fail", "accuracy | dropped", 0.9, 0.97),
    Finding("memory", "ort", "note", "peak memory", 250.0, None, "MB"),
))  # fmt: skip


def test_columns_are_aligned_and_worst_values_shown() -> None:
    """Every row is as the header: numbers end where the header ends; the worst output and the interval are shown."""
    lines = export_table(REPORT).splitlines()
    end = lines[0].index("size MB") + len("size MB")
    assert lines[2][:end].endswith(" 90.50") and lines[3][:end].endswith(" 0.00")
    for text in ("0.998100", "2.50e-03", "accuracy 0.98 -> 0.97, same tokens 1", "12.346", "1.62x [1.55, 1.70]", "250"):
        assert text in lines[2]
    assert set(lines[1]) == {"-", " "}


def test_missing_figures_are_dashes() -> None:
    """A target that was not built, timed or run has dashes, no zeros, and its reason below the table."""
    lines = export_table(REPORT).splitlines()
    assert lines[4].split() == ["trt", "unavailable", *["-"] * 9]
    below = lines[lines.index("") + 1 :]
    assert below[:2] == ["ort-int8: not executed here: the engine was built for other hardware",
                         "ort-int8: ort-int8 is slower than the plain ort"]  # fmt: skip


def test_a_range_of_blocks_is_no_interval() -> None:
    """Where too few blocks were timed for an interval, the table must say that it shows the range of the blocks."""
    report = copy.deepcopy(REPORT)
    report["targets"][0]["speed"] |= {"speedup_ci": None, "speedup_range": [1.55, 1.7], "verdict": "undecided"}
    for text in (export_table(report), export_markdown(report)):
        assert "1.62x, blocks 1.55 to 1.70" in text and "[1.55" not in text


def test_an_interval_that_tells_nothing_is_not_shown() -> None:
    """An interval over orders of magnitude must give way to the range of the blocks, one over a factor of 50 not."""
    report = copy.deepcopy(REPORT)
    speed = report["targets"][0]["speed"]
    speed |= {"speedup_ci": [2.8e-05, 30725.6], "speedup_range": [0.43, 1.14], "verdict": "undecided"}
    assert "blocks 0.43 to 1.14" in export_table(report) and "30725" not in export_table(report)
    assert "1.62x" not in export_table(report)
    speed["speedup_ci"] = [0.2, 10.0]
    assert "1.62x [0.20, 10.00]" in export_table(report)


def test_an_undecided_speed_says_why() -> None:
    """The notes of the timing must stand below the table where they left the verdict open, and only there."""
    report = copy.deepcopy(REPORT)
    speed = report["targets"][0]["speed"]
    speed["notes"] = ["3 undisturbed blocks (a verdict needs 5)"]
    assert "a verdict needs 5" not in export_table(report)
    speed["verdict"] = "undecided"
    assert "ort: timing: 3 undisturbed blocks (a verdict needs 5)" in export_table(report)


def test_text_can_not_move_the_cursor() -> None:
    """The table is printable ASCII whatever a report says."""
    text = export_table(REPORT)
    assert text.isascii() and all(c.isprintable() for c in text.replace("\n", ""))
    assert text.splitlines()[-1] == "trt: no such package  [31m\\xe9"


def test_findings_that_decide_come_first() -> None:
    """A verdict's table starts with what failed and ends with the verdict and the counts."""
    lines = check_table(VERDICT).splitlines()
    assert lines[2].split()[:3] == ["quality", "ort", "accuracy"]
    assert lines[-1] == "verdict: failed (1 fail, 1 pass, 1 note)"
    assert "250 MB" in lines[4]
    assert check_table(VERDICT.to_json()) == check_table(VERDICT)


def test_markdown_is_one_table_without_markup_from_outside() -> None:
    """Every table line has the header's number of cells; pipes, HTML and newlines in values do not break it."""
    for text, columns in ((export_markdown(REPORT), 11), (check_markdown(VERDICT), 6)):
        rows = [line for line in text.splitlines() if line.startswith("|")]
        assert len(rows) > 3
        assert all(line.replace("\\|", "").count("|") == columns + 1 for line in rows)
        assert "<cpu>" not in text
    assert "- cores: 2" in export_markdown(REPORT)


@pytest.mark.parametrize(("statuses", "expected"), [
    ([], "failed"), (["note"], "failed"), (["pass"], "passed"), (["pass", "note"], "passed"),
    (["pass", "inconclusive"], "inconclusive"), (["pass", "inconclusive", "fail"], "failed"),
])  # fmt: skip
def test_verdict_follows_from_findings(statuses: list[Any], expected: str) -> None:
    """One failure fails, else one doubt is inconclusive, and nothing looked at is no pass."""
    assert Verdict(tuple(Finding("g", "s", status, "") for status in statuses)).status == expected


def test_the_precision_says_how_much_of_the_computing_has_it() -> None:
    """An int8 artifact must show what share of its computing is not in fp32, where its engine told; a plain one not."""
    compute = {"int8": 0.86, "fp32": 0.14}
    targets = [{"target": "a", "status": "ok", "precision": "int8", "ran": {"compute_by_precision": compute}},
               {"target": "b", "status": "ok", "precision": "fp32", "ran": {"compute_by_precision": {"fp32": 1.0}}},
               {"target": "c", "status": "ok", "precision": "int8", "ran": {"unknown": "why"}}]  # fmt: skip
    rows = export_table({**REPORT, "targets": targets}).splitlines()[2:]
    assert "int8 86%" in rows[0] and "%" not in rows[1] and "int8  " in rows[2] and "%" not in rows[2]

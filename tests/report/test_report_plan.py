"""A plan as people read it."""

from __future__ import annotations

from deploytool.report.plan import plan_table

MODEL = {"kind": "python", "name": "tiny", "path": "/m/tiny.py", "samples": None}


def test_every_key_has_its_row() -> None:
    """Nothing of the plan may be missing, bytes are in MB, nothing is a dash, and no line is JSON."""
    lines = plan_table({
        "model": MODEL, "targets": ["ort", "trt"], "unavailable": {"trt": "no package"}, "recipes": [],
        "needs_at_least_bytes": {"memory": 121_600_000, "output": 0}, "bench_seconds": 10.0, "quality": True,
    }).splitlines()  # fmt: skip
    assert [line.split() for line in lines[2:]] == [
        ["model", "tiny", "(python:", "/m/tiny.py)"], ["targets", "ort,", "trt"],
        ["unavailable", "trt:", "no", "package"], ["recipes", "-"],
        ["needs", "at", "least", "memory", "122", "MB,", "output", "0", "MB"], ["bench", "seconds", "10"],
        ["quality", "yes"],
    ]  # fmt: skip
    starts = {line.index(word) for line, word in zip(lines[2:4], ("tiny", "ort,"), strict=True)}
    assert len(starts) == 1


def test_long_lists_and_steps_have_rows_of_their_own() -> None:
    """No row is wider than 120 columns, every target is there, and each step stands in a row with its settings."""
    names = [f"some-target-{n}" for n in range(30)]
    text = plan_table({"model": {**MODEL, "samples": "in.npz"}, "targets": names,
                       "steps": [{"step": "svd", "keep": 0.5, "rank": None}, {"step": "fnet"}]})  # fmt: skip
    assert max(map(len, text.splitlines())) <= 120 and "inputs of in.npz" in text
    assert all(name in text.replace(",", " ").split() for name in names)
    assert "step 1   svd: keep: 0.5" in text and "step 2   fnet" in text and "rank" not in text


def test_a_path_cannot_move_the_cursor() -> None:
    """Names come from files: a control character must not reach the terminal."""
    assert "\x1b" not in plan_table({"model": {**MODEL, "path": "/m/\x1b[31m.py"}, "output": "a\rb"})

"""What is recorded of a model beside its graph."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch")
import numpy as np

from deploytool.cases import Case, case_files
from deploytool.load.resolve import resolve
from deploytool.lower.prepare import prepare_job

MODEL = """
import torch
from torch import nn

INPUTS = {{"input": ({leading}, 6)}}


def build():
    torch.manual_seed(0)
    return nn.Linear(6, 2)


def samples():
    return [{{"input": torch.ones({rows}, 6)}}]


def train_batches():
    return [
        {{"input": torch.arange(60.0).reshape(10, 6)[:{taken}] + i, "target": torch.zeros({taken})}}
        for i in range(40)
    ]
"""


def _recorded(folder: Path, leading: str, rows: int, taken: int) -> list[np.ndarray]:
    """The calibration feeds of a model whose training batches have `taken` rows."""
    file = folder / "wide.py"
    file.write_text(MODEL.format(leading=leading, rows=rows, taken=taken))
    ref = resolve(str(file), None)
    prepare_job(vars(ref), str(folder / "out"), None, 0)
    return [Case.load(path).inputs["input"] for path in case_files(folder / "out" / "calibration")]


def test_calibration_takes_a_few_rows_of_many_batches(tmp_path: Path) -> None:
    """The first rows of each of 32 training batches are kept: whole batches would be run many times by quantizers."""
    feeds = _recorded(tmp_path, '"batch"', 2, 10)
    assert [feed.shape for feed in feeds] == [(4, 6)] * 32
    assert np.array_equal(feeds[1], np.arange(60.0).reshape(10, 6)[:4] + 1)


def test_batches_of_a_fixed_size_stay_whole(tmp_path: Path) -> None:
    """A model that takes ten rows and no other number must get ten."""
    assert {feed.shape for feed in _recorded(tmp_path, "10", 10, 10)} == {(10, 6)}


ROWS = """
import torch
from torch import nn

INPUTS = {{"input": ("batch", 6)}}


class Rows(nn.Module):
    def forward(self, input):
        {body}


def build():
    return Rows()


def samples():
    return [{{"input": torch.arange(6.0 * n).reshape(n, 6)}} for n in (4, 8, 6)]
"""
REFUSES = "assert len(input) > 1; return input * 2"


@pytest.mark.parametrize(
    ("body", "kept"), [("return input * 2", [1, 2, 3]), (REFUSES, [2, 3]), ("return input / input.std(0)", [2, 3])]
)
def test_few_rows_are_compared_where_the_model_takes_them(body: str, kept: list[int], tmp_path: Path) -> None:
    """Batches of 1, 2 and 3 come after the samples; a number that the model refuses, or gives NaN for, is left out."""
    file = tmp_path / "rows.py"
    file.write_text(ROWS.format(body=body))
    prepared = prepare_job(vars(resolve(str(file), None)), str(tmp_path / "out"), None, 0)
    cases = [Case.load(path) for path in case_files(tmp_path / "out" / "cases")]
    assert [len(case.inputs["input"]) for case in cases] == [4, 8, 6, *kept]
    assert prepared["cases"] == prepared["shapes"] == len(cases)
    assert all(len(output) == len(case.inputs["input"]) for case in cases for output in case.reference.values())

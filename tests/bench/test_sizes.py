"""Recorded inputs at other sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from deploytool.bench.sizes import resized, resized_case
from deploytool.bench.throughput import batch_dimension
from deploytool.cases import Case
from deploytool.errors import InputRefused, UsageProblem
from deploytool.signature import Signature, TensorSpec

IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
MASK = TensorSpec("mask", "int64", ("batch", "sequence"))
SIGNATURE = Signature((IDS, MASK), (TensorSpec("y", "float32", ("batch",)),))


def feeds(batch: int, sequence: int) -> dict[str, np.ndarray]:
    ids = np.arange(batch * sequence).reshape(batch, sequence)
    return {"ids": ids, "mask": ids % 2}


def test_cut_and_repeated() -> None:
    """Sizes below the recorded one cut, sizes above it repeat from the start, alike in every input."""
    found = resized(SIGNATURE, feeds(2, 3), {"batch": 3, "sequence": 2})
    assert found["ids"].tolist() == [[0, 1], [3, 4], [0, 1]]
    assert found["mask"].tolist() == [[0, 1], [1, 0], [0, 1]]
    assert resized(SIGNATURE, feeds(1, 2), {"sequence": 5})["ids"].tolist() == [[0, 1, 0, 1, 0]]


def test_the_nearest_case_is_taken(tmp_path: Path) -> None:
    """A recorded case of the very size is taken as it is; else one that need only be cut, before one to repeat."""
    for number, (batch, sequence) in enumerate([(1, 8), (1, 128), (2, 16)]):
        Case(feeds(batch, sequence)).save(tmp_path / f"{number}.npz")
    cases = sorted(tmp_path.glob("*.npz"))
    exact = Case.load(resized_case(SIGNATURE, cases, {"batch": 2, "sequence": 16}, tmp_path / "made")).inputs
    assert exact["ids"].tolist() == feeds(2, 16)["ids"].tolist()
    cut = Case.load(resized_case(SIGNATURE, cases, {"batch": 1, "sequence": 64}, tmp_path / "made")).inputs
    assert cut["ids"].tolist() == feeds(1, 128)["ids"][:, :64].tolist()


def test_refuses_what_is_not_free(tmp_path: Path) -> None:
    """A dimension that the model does not have is refused with the nearest name."""
    Case(feeds(1, 8)).save(tmp_path / "0.npz")
    with pytest.raises(UsageProblem, match="free dimensions") as caught:
        resized_case(SIGNATURE, [tmp_path / "0.npz"], {"sequnce": 64}, tmp_path / "made")
    assert "did you mean 'sequence'?" in str(caught.value)


def test_which_dimension_is_the_batch() -> None:
    """The batch is the dimension that is always first; a model without one has no throughput over batches."""
    assert batch_dimension(SIGNATURE) == "batch"
    with pytest.raises(InputRefused, match="batch dimension"):
        batch_dimension(Signature((TensorSpec("x", "float32", (2, "n")),), (TensorSpec("y", "float32", (2,)),)))

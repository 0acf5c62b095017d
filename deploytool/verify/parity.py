"""An artifact's outputs against the reference's, on every recorded case; nothing is skipped, nothing passes unseen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.backends.ran import Asked
from deploytool.cases import Case, case_files
from deploytool.difference import Difference
from deploytool.errors import InputRefused
from deploytool.verify.sizes import Seen

_ENOUGH_CASES = 3
_SMALL_GOLDEN = 3  # the timed case and the smallest others
_GOLDEN_BYTES = 64_000_000  # of inputs and reference outputs, but that the timed case is always kept
_LARGE_BYTES, _LARGE_SHARE = 1_000_000, 0.25  # what the largest golden case may take, by itself and of the engine


def parity_job(artifact: str, cases: str, golden: str | None = None, largest: bool = True) -> dict[str, Any]:
    """Run every case of the folder `cases` on an artifact and compare (in a worker).

    Without `largest` the case with the most bytes is left out, where three others stay. With `golden`, the timed case,
    the smallest others and the largest that is small beside the engine are written there with the artifact's own
    outputs. Returns {"cases": n, "sizes": {free
    dimension: sizes}, "padded": cases with padding, "outputs": {name: figures}}; see Seen and Difference for the
    figures. With `golden` also "ran", of the timed case; see Asked.ran.
    """
    opened = Artifact.load(Path(artifact), check=False)
    files = case_files(Path(cases))
    if not files:
        raise InputRefused("DT303", f"{cases} must hold at least one case to compare (got none)")
    chosen = list(enumerate(files))
    if not largest and len(files) > _ENOUGH_CASES:
        chosen.remove(max(chosen, key=lambda case: case[1].stat().st_size))
    kept = _golden(files, opened.size_bytes) if golden else set()
    batched = {s.name: bool(s.shape) and s.shape[0] == "batch" for s in opened.signature.outputs}
    expected = Case.load(files[0]).reference  # an output that the artifact does not have is one that is missing
    names = dict.fromkeys((*opened.signature.output_names, *expected))
    differences = {name: Difference(name, batched.get(name, False)) for name in names}
    seen = Seen(opened.signature)
    with Asked(opened) if golden else open_artifact(opened) as runner:
        for index, path in chosen:
            case = Case.load(path)
            outputs = runner.run(case.inputs)
            seen.add(case)
            for name, difference in differences.items():
                difference.add(index, case.reference.get(name), outputs.get(name))
            if golden and path in kept:
                Case(case.inputs, case.reference, outputs).save(Path(golden) / path.name)
    found = {name: difference.summary() for name, difference in differences.items()}
    figures = {"cases": len(chosen), **seen.summary(), "outputs": found}
    return {**figures, "ran": runner.ran(Case.load(files[0]).inputs)} if isinstance(runner, Asked) else figures


def replay_job(artifact: str, cases: str, out: str) -> int:
    """Run an artifact on the inputs of every case of `cases` and write its outputs to `out`; returns how many."""
    files = case_files(Path(cases))
    with open_artifact(Artifact.load(Path(artifact), check=False)) as runner:
        for path in files:
            inputs = Case.load(path).inputs
            Case(inputs, outputs=runner.run(inputs)).save(Path(out) / path.name)
    return len(files)


def _golden(files: Sequence[Path], engine_bytes: int) -> set[Path]:
    """The files to keep as golden cases: the example that is timed, then the smallest ones, then the largest that fits.

    All stay below `_GOLDEN_BYTES`. The largest lets a bundle grow by a quarter of the engine or by a megabyte: its own
    outputs come to lie beside the reference's, so it counts twice.
    """
    kept: set[Path] = set()
    total = 0
    by_size = sorted(files[1:], key=lambda p: p.stat().st_size)
    for path in [files[0], *by_size][:_SMALL_GOLDEN]:
        total += path.stat().st_size
        if not kept or total <= _GOLDEN_BYTES:
            kept.add(path)
    allowed = min(max(_LARGE_BYTES, int(_LARGE_SHARE * engine_bytes)) // 2, _GOLDEN_BYTES - total)
    return kept | set([path for path in by_size if path.stat().st_size <= allowed][-1:])

"""Recorded cases: inputs and outputs of one run as an `.npz` file, without pickle.

Keys: `in.NAME` inputs, `ref.NAME` the reference's outputs, `out.NAME` the artifact's own outputs.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.errors import InputRefused
from deploytool.signature import Outputs, Signature
from deploytool.storage import write_bytes


@dataclass(frozen=True)
class Case:
    """One recorded run; `reference` and `outputs` are empty where they were not recorded."""

    inputs: Outputs
    reference: Outputs = field(default_factory=dict)
    outputs: Outputs = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the case; the same arrays give the same bytes."""
        buffer = io.BytesIO()
        arrays = {f"{kind}.{name}": array for kind, group in self._groups().items() for name, array in group.items()}
        np.savez(buffer, allow_pickle=False, **arrays)
        write_bytes(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> Case:
        groups: dict[str, Outputs] = {"in": {}, "ref": {}, "out": {}}
        try:
            for key, array in read_npz(path).items():
                kind, _, name = key.partition(".")
                groups[kind][name] = array
        except (KeyError, ValueError) as error:
            raise InputRefused("DT311", f"{path} must be a recorded case (got: {error})") from error
        return cls(groups["in"], groups["ref"], groups["out"])

    def _groups(self) -> Mapping[str, Outputs]:
        return {"in": self.inputs, "ref": self.reference, "out": self.outputs}


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """The arrays of an .npz file by name; ValueError, with what was wrong, for anything else: nothing is unpickled.

    The list is what NumPy, zipfile and zlib raise for files that are cut off or damaged: an unknown compression method
    is a NotImplementedError, a forged size a MemoryError, a lone .npy array lacks the attributes of an archive.
    """
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, NotImplementedError, MemoryError,
            zipfile.BadZipFile, zlib.error) as error:  # fmt: skip
        raise ValueError(str(error)[:300] or type(error).__name__) from error


def case_files(folder: Path) -> list[Path]:
    """The case files of a folder in their order."""
    return sorted(folder.glob("*.npz"))


def read_cases(folder: Path) -> Iterator[Case]:
    """The cases of a folder, one in memory at a time."""
    for path in case_files(folder):
        yield Case.load(path)


def sizes_of(signature: Signature, cases: Iterable[Case]) -> dict[str, list[int]]:
    """The sizes of each free dimension that the cases have, sorted."""
    seen: dict[str, set[int]] = {}
    for case in cases:
        for dim, size in signature.bind(case.inputs).items():
            seen.setdefault(dim, set()).add(size)
    return {dim: sorted(sizes) for dim, sizes in seen.items()}


def unrecorded(recorded: Mapping[str, list[int]], count: int, parity: Mapping[str, Any] | None) -> str | None:
    """What a report's "parity" was taken on that `count` recorded cases of these sizes lack; None where it is nothing.

    "4 of the 10 compared cases are recorded, with batch 1, 3, 33; none with batch 2, 5, 8"
    """
    compared = parity.get("cases") if parity else None
    if not parity or not isinstance(compared, int) or compared <= count:
        return None
    sizes = parity.get("sizes") or {}
    missing = {dim: sorted(set(seen) - set(recorded.get(dim, ()))) for dim, seen in sizes.items()}
    have, lack = (_listed(found) for found in (recorded, missing))
    said = f"{count} of the {compared} compared cases are recorded"
    return said + (f", with {have}" if have else "") + (f"; none with {lack}" if lack else "")


def _listed(sizes: Mapping[str, list[int]]) -> str:
    return "; ".join(f"{dim} {', '.join(map(str, found))}" for dim, found in sizes.items() if found)

"""Samples that a user gives as files: one .npz per sample, or a folder of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from deploytool.cases import read_npz
from deploytool.errors import InputRefused, nearest
from deploytool.signature import Outputs, Signature, TensorSpec

_RECORDED = "in."  # recorded cases, such as the golden ones of an artifact, name their inputs so


def read_samples(path: Path, inputs: Sequence[TensorSpec]) -> list[tuple[Path, Outputs]]:
    """Each file and its sample {input name: array}, in the order of the files' names; raises InputRefused DT303."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        what = "a folder without any" if path.is_dir() else "not a file" if path.exists() else "which does not exist"
        raise InputRefused("DT303", f"samples must be an .npz file or a folder of such files (got {path}, {what})",
                           fix="write them with numpy.savez(file, **{input name: array})")  # fmt: skip
    signature = Signature(tuple(inputs), ())
    return [(file, _sample(file, signature)) for file in files]


def _sample(file: Path, signature: Signature) -> Outputs:
    try:
        arrays = read_npz(file)
    except ValueError as error:
        raise InputRefused("DT303", f"{file} must be an .npz file of plain arrays (got: {error})",
                           fix="write it with numpy.savez(file, **{input name: array})") from error  # fmt: skip
    recorded = {name.removeprefix(_RECORDED): a for name, a in arrays.items() if name.startswith(_RECORDED)}
    sample = recorded if recorded and not set(signature.input_names) & set(arrays) else arrays
    try:
        signature.bind(sample)
    except InputRefused as error:
        near = [nearest(name, signature.input_names) for name in sample if name not in signature.input_names]
        raise InputRefused("DT303", f"{file.name} must hold one sample of the model: {error.message}",
                           detail=[*map(str, signature.inputs), *near[:3]]) from error  # fmt: skip
    return sample

"""Builds one artifact from a prepared folder: what runs in the worker process of a build."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.backends.base import Request, build_artifact, find_backend
from deploytool.cases import read_cases
from deploytool.encoding import ENCODINGS
from deploytool.errors import InputRefused
from deploytool.signature import Outputs, Signature
from deploytool.source import ModelRef, Source
from deploytool.storage import read_json
from deploytool.target import Target


def build_job(
    target: Mapping[str, Any], prepared: str, ref: Mapping[str, str], fingerprint: str, out: str, seed: int
) -> dict[str, Any]:
    """Build `target` into the empty folder `out` from what `lower.prepare` wrote; returns the manifest."""
    folder, profile = Path(prepared), Target.model_validate(dict(target), strict=False)
    accepts = find_backend(profile.backend).accepts
    source = _open_source(ref, read_json(folder / "prepared.json")["weights"], seed) if accepts == "source" else None
    portable = Artifact.load(folder / "onnx", check=False) if accepts == "onnx" else None

    def calibration() -> Iterator[Outputs]:
        return (case.inputs for case in read_cases(folder / "calibration"))

    def cases() -> Iterator[Outputs]:
        return (case.inputs for case in read_cases(folder / "cases"))

    def references() -> Iterator[Outputs]:
        return (case.reference for case in read_cases(folder / "cases"))

    request = Request(
        target=profile,
        signature=Signature.from_json(read_json(folder / "signature.json")),
        source=source,
        portable=portable,
        calibration=calibration,
        cases=cases,
        out=Path(out),
        seed=seed,
        ref=ModelRef(**ref),
        references=references,
        kept=folder / "measured",
        encodings=folder / ENCODINGS if (folder / ENCODINGS).is_file() else None,
    )
    _copy_assets(folder / "assets", Path(out))
    model = {"name": ref["name"], "ref": dict(ref), "fingerprint": fingerprint}
    return build_artifact(request, model, portable.history if portable else ()).to_json()


def _open_source(ref: Mapping[str, str], weights: Mapping[str, str], seed: int) -> Source:
    """The model, with the weights that it was prepared with."""
    # Imported here: a build from the ONNX graph does without torch, which takes seconds to import.
    torch = importlib.import_module("torch")
    torch.manual_seed(seed)  # as it was prepared
    source: Source = importlib.import_module("deploytool.load.model").open_source(ModelRef(**ref))
    digest = importlib.import_module("deploytool.load.digest").weights_digest(source.module)
    if digest != weights[ref["path"]]:
        raise InputRefused("DT302", f"{ref['name']} must have the same weights every time that it is built "
                           "(they differ from those that it was prepared with)",
                           fix="load trained weights in build(); seed what is drawn at random")  # fmt: skip
    return source


def _copy_assets(assets: Path, out: Path) -> None:
    for path in sorted(assets.iterdir()):
        shutil.copyfile(path, out / path.name)

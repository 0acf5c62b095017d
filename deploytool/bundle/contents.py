"""The artifacts at a path: an artifact folder, the output folder of an export, or a bundle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from deploytool import artifact as artifacts
from deploytool.artifact import Artifact
from deploytool.bundle import manifest as manifests
from deploytool.bundle.trial import unpacked
from deploytool.bundle.verify import verify_bundle
from deploytool.errors import InputRefused
from deploytool.storage import read_json, sha256_file

FAILED = ".failed"  # export keeps what is outside its limits as NAME.failed, for a look, not for use


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Artifact]]:
    """The artifacts at `path` by target, while the block runs (a tar lies in a temporary folder until then).

    A bundle is verified first. The files of plain folders are not: that is for whoever uses them. Raises
    InputRefused when there is nothing of the kind, or two artifacts for one target.
    """
    if path.suffix in (".py", ".onnx") and path.is_file():
        raise InputRefused("DT309", f"{path} must be an artifact, a folder of artifacts, or a bundle (got a model)",
                           fix=f"build it first: deploytool export {path} --target NAME -o FOLDER")  # fmt: skip
    if path.is_file() or (path / manifests.MANIFEST).is_file():
        with unpacked(path) as folder:
            bundle = verify_bundle(folder)
            places = [folder / manifests.VARIANTS / variant.target for variant in bundle.variants]
            yield _by_target(path, places)
    elif (path / artifacts.MANIFEST).is_file():
        yield _by_target(path, [path])
    else:
        yield _by_target(path, artifact_folders(path))


def artifact_folders(path: Path) -> list[Path]:
    """The artifacts' folders below an export's output, damaged ones too; none below an artifact or a bundle."""
    if path.is_file() or any((path / name).is_file() for name in (manifests.MANIFEST, artifacts.MANIFEST)):
        return []
    # Recorded cases without a manifest are an artifact that lost it: left out it would pass unseen.
    signs = (artifacts.MANIFEST, artifacts.GOLDEN)
    return sorted({place.parent for sign in signs for place in path.glob(f"[!.]*/{sign}")})


def left_over(path: Path, found: Mapping[str, Artifact]) -> tuple[list[str], dict[str, str]]:
    """Of the artifacts in an export's output those that its last export did not write: (of that model too, stale).

    `stale` says why for each: the last export was of another model, or of a changed one, or failed for that target, or
    nothing that it wrote is here to tell of what model it was. Nothing is left over where no report of an export lies
    beside the artifacts. Raises InputRefused where it is broken.
    """
    report = path / artifacts.REPORT
    if not report.is_file() or (path / artifacts.MANIFEST).is_file():
        return [], {}
    try:
        results = read_json(report)["targets"]
        written = {result["artifact_digest"] for result in results}
        failed = {result["target"] for result in results if result["status"] == "failed"}
    except (ValueError, KeyError, TypeError) as error:
        raise InputRefused("DT309", f"{report} must be the report of an export (got: {error!r})",
                           fix="export again, or name the artifacts one by one") from error  # fmt: skip
    older = {n: a for n, a in found.items() if sha256_file(a.folder / artifacts.MANIFEST) not in written}
    models = [a.model.get("fingerprint") for name, a in found.items() if name not in older]
    stale = {name: "the last export failed for it" for name in older if name in failed}
    stale |= {name: "it is of another model, or of this one before it was changed" for name, a in older.items()
              if models and a.model.get("fingerprint") not in models}  # fmt: skip
    if not models:
        stale = dict.fromkeys(older, "the last export left no artifact here to show that it is of that model") | stale
    return [name for name in older if name not in stale], stale


def _by_target(path: Path, folders: list[Path]) -> dict[str, Artifact]:
    found: dict[str, Artifact] = {}
    for folder in folders:
        artifact = Artifact.load(folder, check=False)
        target = str(artifact.target.get("name", folder.name))
        if target in found:
            raise InputRefused("DT309", f"{path} must hold one artifact per target (got two for {target!r})")
        found[target] = artifact
    if not found:
        raise InputRefused("DT309", f"{path} must be an artifact, a folder of artifacts, or a bundle (got none)")
    return found

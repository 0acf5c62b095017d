"""The artifacts at a path: an artifact folder, the output folder of an export, or a bundle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploytool import artifact as artifacts
from deploytool.artifact import Artifact
from deploytool.bundle import manifest as manifests
from deploytool.bundle.trial import unpacked
from deploytool.bundle.verify import verify_bundle
from deploytool.errors import InputRefused

FAILED = ".failed"  # export keeps what is outside its limits as NAME.failed, for a look, not for use


@contextmanager
def opened(path: Path) -> Iterator[dict[str, Artifact]]:
    """The artifacts at `path` by target, while the block runs (a tar lies in a temporary folder until then).

    A bundle is verified first. The files of plain folders are not: that is for whoever uses them. Raises
    InputRefused when there is nothing of the kind, or two artifacts for one target.
    """
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

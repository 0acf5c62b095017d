"""An artifact's manifest names exactly what lies in its folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deploytool.artifact import Artifact
from deploytool.cases import Case
from deploytool.errors import InputRefused, IntegrityBroken
from deploytool.signature import Signature, TensorSpec

SIGNATURE = Signature((TensorSpec("x", "float32", ("batch", 2)),), (TensorSpec("y", "float32", ("batch", 2)),))


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    (tmp_path / "a" / "assets").mkdir(parents=True)
    (tmp_path / "a" / "engine.bin").write_bytes(b"engine")
    (tmp_path / "a" / "assets" / "report.json").write_text("{}")
    return Artifact(tmp_path / "a", "eager", "source", "engine.bin", "fp32", SIGNATURE).save()


def test_nested_report_is_a_file_like_any_other(artifact: Artifact) -> None:
    """Only the report beside the manifest is left out of the checksums; one of the same name below is not."""
    assert [f.path for f in artifact.files] == ["assets/report.json", "engine.bin"]
    (artifact.folder / "assets" / "report.json").write_text("[]")
    with pytest.raises(IntegrityBroken, match="unchanged"):
        Artifact.load(artifact.folder)


def test_link_is_not_a_file(artifact: Artifact, tmp_path: Path) -> None:
    """A symbolic link in an artifact is refused, whether it points to a file or a folder."""
    (artifact.folder / "more").symlink_to(tmp_path)
    with pytest.raises(IntegrityBroken, match="regular files"):
        Artifact.load(artifact.folder)


def test_wrong_size_in_the_manifest_is_seen(artifact: Artifact) -> None:
    """A manifest that lies about a size is refused although the checksum is right."""
    manifest = artifact.folder / "artifact.json"
    data = json.loads(manifest.read_text())
    data["files"][1]["size"] = 1
    manifest.write_text(json.dumps(data))
    with pytest.raises(IntegrityBroken) as caught:
        Artifact.load(artifact.folder)
    assert caught.value.detail == ("changed: engine.bin",)


@pytest.mark.parametrize("text", ["", "[]", '{"schema_version": "2.0"}', "\udcff"])
def test_foreign_manifest_is_refused(artifact: Artifact, text: str) -> None:
    """A manifest that is empty, foreign, newer or no text is refused as input, not as a crash."""
    (artifact.folder / "artifact.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InputRefused):
        Artifact.load(artifact.folder)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 no archive", b"text", None])
def test_damaged_case_is_refused(tmp_path: Path, damage: bytes | None) -> None:
    """A case file that is empty, truncated, no archive or a bare array is refused as input, not as a crash."""
    path = tmp_path / "000.npz"
    if damage is None:
        with path.open("wb") as file:
            np.save(file, np.zeros(3))
    else:
        path.write_bytes(damage)
    with pytest.raises(InputRefused, match="recorded case"):
        Case.load(path)


def test_truncated_case_is_refused(tmp_path: Path) -> None:
    """A case file cut at half is refused."""
    path = tmp_path / "000.npz"
    Case({"x": np.arange(1000.0)}).save(path)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(InputRefused):
        Case.load(path)

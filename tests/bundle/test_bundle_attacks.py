"""Damaged and hostile bundles: each is refused for what it is, and nothing is written."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")

from tiny_artifact import digests, make, redo_all, redo_sums

from deploytool.bundle.archive import Member, write_tar
from deploytool.bundle.manifest import SELFTEST, SUMS
from deploytool.bundle.pack import pack
from deploytool.bundle.verify import unpack, verify_bundle
from deploytool.errors import DeployError, InputRefused, IntegrityBroken


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a good bundle as folder `b` and as `b.tar`."""
    place = tmp_path_factory.mktemp("packed")
    artifact = make(place / "a")
    pack([artifact], place / "b", name="tiny", version="1")
    pack([artifact], place / "b.tar", name="tiny", version="1", kind="tar")
    return place


@pytest.fixture
def bundle(packed: Path, tmp_path: Path) -> Path:
    """A copy of the folder bundle to damage."""
    return Path(shutil.copytree(packed / "b", tmp_path / "b"))


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def files_of(packed: Path) -> list[str]:
    return sorted(digests(packed / "b"))


def test_good_bundle_is_accepted(packed: Path) -> None:
    """What `pack` wrote passes, as folder and as tar: the refusals below are not for everything."""
    assert verify_bundle(packed / "b") == verify_bundle(packed / "b.tar")


def test_flipped_byte_is_found_in_every_file(packed: Path, bundle: Path) -> None:
    """One bit changed in any file of the folder is an integrity error that names the file."""
    for name in files_of(packed):
        path = bundle / name
        flip(path, path.stat().st_size // 2)
        with pytest.raises(IntegrityBroken) as caught:
            verify_bundle(bundle)
        assert name in str(caught.value) or name == "SHA256SUMS"
        shutil.copy(packed / "b" / name, path)
    verify_bundle(bundle)


def test_flipped_byte_is_found_anywhere_in_the_tar(packed: Path, tmp_path: Path) -> None:
    """One bit changed at any of 400 places of the tar, headers and padding included, is refused."""
    good = (packed / "b.tar").read_bytes()
    path = tmp_path / "bad.tar"
    for position in range(0, len(good), max(1, len(good) // 400)):
        bad = bytearray(good)
        bad[position] ^= 1
        path.write_bytes(bad)
        with pytest.raises((IntegrityBroken, InputRefused)):
            verify_bundle(path)


@pytest.mark.parametrize("cut", [0, 1, 511, 512, 5000, -1, -1024, -1025])
def test_truncated_tar_is_refused(packed: Path, tmp_path: Path, cut: int) -> None:
    """A tar that ends early is refused, wherever it was cut."""
    path = tmp_path / "cut.tar"
    path.write_bytes((packed / "b.tar").read_bytes()[:cut])
    with pytest.raises(InputRefused):
        verify_bundle(path)


def test_data_after_the_end_is_refused(packed: Path, tmp_path: Path) -> None:
    """Nothing hides behind the end of a tar."""
    path = tmp_path / "long.tar"
    path.write_bytes((packed / "b.tar").read_bytes() + bytes(512))
    with pytest.raises(InputRefused, match="more follows"):
        verify_bundle(path)


@pytest.mark.parametrize("name", ["variants/ort/model.onnx", "variants/ort/golden/000.npz", SELFTEST, SUMS])
def test_missing_file_is_named(bundle: Path, name: str) -> None:
    """A file that is gone is an integrity error that names it."""
    (bundle / name).unlink()
    with pytest.raises(IntegrityBroken) as caught:
        verify_bundle(bundle)
    assert name in str(caught.value)


def test_added_file_is_named(bundle: Path) -> None:
    """A file that was added is an integrity error that names it, wherever it lies."""
    for name in ("numpy.py", "variants/ort/more.bin", "variants/new/model.onnx"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_text("more")
        with pytest.raises(IntegrityBroken) as caught:
            verify_bundle(bundle)
        assert f"added: {name}" in caught.value.detail
        (bundle / name).unlink()


def test_renamed_file_is_named(bundle: Path) -> None:
    """A renamed file is both missing and added."""
    (bundle / "variants/ort/model.onnx").rename(bundle / "variants/ort/model2.onnx")
    with pytest.raises(IntegrityBroken) as caught:
        verify_bundle(bundle)
    assert len(caught.value.detail) == 2


def test_added_file_with_right_sums_is_still_refused(bundle: Path) -> None:
    """A file that SHA256SUMS names but the manifest does not, is refused."""
    (bundle / "numpy.py").write_text("print('hello')")
    redo_sums(bundle)
    with pytest.raises(IntegrityBroken) as caught:
        verify_bundle(bundle)
    assert "not in deploytool.json: numpy.py" in caught.value.detail


def test_changed_engine_with_right_sums_is_still_refused(bundle: Path) -> None:
    """An engine that agrees with SHA256SUMS but not with the manifest, is refused."""
    (bundle / "variants/ort/model.onnx").write_bytes(b"other")
    redo_sums(bundle)
    with pytest.raises(IntegrityBroken, match="unchanged"):
        verify_bundle(bundle)


def edit(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "deploytool.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    redo_sums(bundle)


def drop_files(data: dict[str, Any]) -> None:
    data["files"] = data["files"][:-1]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "schema 1.0 (got 2.0)": lambda d: d.update(schema_version="2.0"),
    "unknown key 'nmae'; did you mean 'name'?": lambda d: d.update(nmae="x"),
    "unknown key 'variants.0.tolerence'; did you mean 'tolerance'?":
        lambda d: d["variants"][0].update(tolerence=1),
    "'version'": lambda d: d.pop("version"),
    "'variants'": lambda d: d.update(variants=[]),
    "'name'": lambda d: d.update(name="../x"),
    "'variants.0.target'": lambda d: d["variants"][0].update(target="../ort"),
    "'variants.0.tolerance.cosine_min'": lambda d: d["variants"][0]["tolerance"].update(cosine_min="low"),
    "each target once": lambda d: d["variants"].append(d["variants"][0]),
    "what its artifact.json says": lambda d: d["variants"][0].update(precision="int8"),
    "not in deploytool.json": drop_files,
}  # fmt: skip


@pytest.mark.parametrize("sentence", CHANGES)
def test_wrong_manifest_is_refused(bundle: Path, sentence: str) -> None:
    """A manifest that is newer, has unknown keys, lacks some, or contradicts the files, is refused with the reason."""
    edit(bundle, CHANGES[sentence])  # type: ignore[arg-type]
    with pytest.raises((InputRefused, IntegrityBroken)) as caught:
        verify_bundle(bundle)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema_version": "1.0", "schema_version": "1.0"}', "[" * 100_000])
def test_manifest_that_is_no_manifest_is_refused(bundle: Path, text: str) -> None:
    """Empty, foreign, cut, ambiguous or absurdly nested JSON is refused as input."""
    (bundle / "deploytool.json").write_text(text)
    redo_sums(bundle)
    with pytest.raises(InputRefused):
        verify_bundle(bundle)


def test_artifact_manifest_must_agree(bundle: Path) -> None:
    """A variant whose own artifact.json names other files is refused although all checksums of the bundle are right."""
    path = bundle / "variants/ort/artifact.json"
    data = json.loads(path.read_text())
    redo_all(bundle)
    verify_bundle(bundle)
    data["files"] = data["files"][1:]
    path.write_text(json.dumps(data))
    manifest = json.loads((bundle / "deploytool.json").read_text())
    for entry in manifest["files"]:
        if entry["path"].endswith("artifact.json"):
            entry |= {"size": path.stat().st_size, "sha256": digests(path.parent)["artifact.json"]}
    (bundle / "deploytool.json").write_text(json.dumps(manifest))
    redo_sums(bundle)
    with pytest.raises(IntegrityBroken, match=r"its artifact\.json"):
        verify_bundle(bundle)


def test_link_in_a_folder_is_refused(bundle: Path, packed: Path) -> None:
    """A symbolic link, to a file or a folder, and a pipe are refused even where the content would be right."""
    engine = bundle / "variants/ort/model.onnx"
    engine.unlink()
    engine.symlink_to(packed / "b/variants/ort/model.onnx")
    with pytest.raises(InputRefused, match="regular files"):
        verify_bundle(bundle)
    engine.unlink()
    os.mkfifo(engine)
    with pytest.raises(InputRefused, match="regular files"):
        verify_bundle(bundle)


def hostile(path: Path, *members: tarfile.TarInfo, format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar as another program writes it."""
    with tarfile.open(path, "w", format=format) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
    return path


def entry(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, size
    return info


HOSTILE = {
    "a symbolic link": entry("b/link", tarfile.SYMTYPE, "/etc/passwd"),
    "a hard link": entry("b/link", tarfile.LNKTYPE, "b/selftest.py"),
    "a device": entry("b/null", tarfile.CHRTYPE),
    "a pipe": entry("b/pipe", tarfile.FIFOTYPE),
    "a folder": entry("b/", tarfile.DIRTYPE),
    "must have headers as": entry("b/late"),
}
HOSTILE["must have headers as"].mtime = 1


@pytest.mark.parametrize("sentence", HOSTILE)
def test_tar_with_anything_but_plain_files_is_refused(tmp_path: Path, sentence: str) -> None:
    """Links, devices, pipes and headers with other owners or times are refused by what they are."""
    refuse(hostile(tmp_path / "in.tar", HOSTILE[sentence]), tmp_path, sentence)


def test_extended_headers_are_refused(tmp_path: Path) -> None:
    """A long name in another program's extension does not get in."""
    for number, format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        refuse(hostile(tmp_path / f"{number}.tar", entry("b/" + "n" * 120), format=format), tmp_path, "must")


NAMES = {
    "an empty, '.' or '..' part": ["b/../../out"], "absolute": ["/etc/out"], "unusual characters": ["b/a\\..\\out"],
    "one name": ["b/Model.onnx", "b/model.onnx"], "file and folder": ["b/a", "b/a/c"],
    "one top folder": ["b/a", "c/a"], "ends in a space or dot": ["b/a."], "each file once": ["b/a", "b/a"],
    "a part that is too long": ["b/a\nb"], "'b//a'": ["b//a"], "got 'b/C:": ["b/C:x"],
}  # fmt: skip


@pytest.mark.parametrize("sentence", NAMES)
def test_tar_with_unsafe_names_is_refused(tmp_path: Path, sentence: str) -> None:
    """Names that leave the folder, mean two files, or mean something else on another system are refused."""
    path = tmp_path / "in.tar"
    with path.open("wb") as file:
        write_tar(file, [(Member(name, 1), [b"x"]) for name in NAMES[sentence]])
    refuse(path, tmp_path, sentence)


def test_huge_declared_size_is_refused_at_once(tmp_path: Path) -> None:
    """A header that declares 8 GiB in a file of 2 KB is refused before anything is written."""
    path = tmp_path / "in.tar"
    with path.open("wb") as file:
        write_tar(file, [(Member("b/a", 1), [b"x"])])
    data = bytearray(path.read_bytes())
    data[124:135] = b"7" * 11
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    path.write_bytes(data)
    refuse(path, tmp_path, "the file ends before")


def test_many_entries_are_refused(tmp_path: Path) -> None:
    """A tar of more entries than a bundle can have is refused."""
    path = tmp_path / "in.tar"
    with path.open("wb") as file:
        write_tar(file, ((Member(f"b/{n}", 0), []) for n in range(10_001)))
    refuse(path, tmp_path, "at most 10000")


@pytest.mark.parametrize("data", [b"", b"\x1f\x8b\x08 gzip", b"PK\x03\x04" * 200, b"version https://git-lfs" * 40])
def test_file_that_is_no_tar_is_refused(tmp_path: Path, data: bytes) -> None:
    """Empty, compressed and foreign files are refused."""
    path = tmp_path / "in.tar"
    path.write_bytes(data)
    refuse(path, tmp_path, "must")


def test_missing_bundle_is_refused(tmp_path: Path) -> None:
    """A path that is not there, or an empty folder, is refused."""
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputRefused):
            verify_bundle(path)


def test_destination_is_untouched(packed: Path, tmp_path: Path) -> None:
    """Unpacking a damaged bundle leaves what was at the destination, and no rest beside it."""
    bad = tmp_path / "bad.tar"
    shutil.copy(packed / "b.tar", bad)
    flip(bad, bad.stat().st_size // 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(DeployError):
        unpack(bad, tmp_path / "out", overwrite=True)
    assert digests(tmp_path / "out").keys() == {"mine"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.tar", "out"]


def refuse(path: Path, place: Path, sentence: str) -> None:
    """Refused as input by `unpack`, with `sentence`, and nothing new lies anywhere."""
    before = sorted(place.rglob("*"))
    with pytest.raises(InputRefused) as caught:
        unpack(path, place / "out")
    assert sentence in str(caught.value)
    assert sorted(place.rglob("*")) == before

"""Packing: equal inputs give equal bytes, and only what was proved is packed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Literal

import pytest

pytest.importorskip("onnx")

from tiny_artifact import digests, make, write_report

from deploytool.artifact import Artifact
from deploytool.bundle.contents import opened
from deploytool.bundle.manifest import read_manifest
from deploytool.bundle.pack import pack
from deploytool.bundle.verify import unpack, verify_bundle
from deploytool.cli.main import run
from deploytool.errors import CheckFailed, InputRefused, IntegrityBroken, UsageProblem
from deploytool.gate.evidence import read_report
from deploytool.storage import sha256_file


def test_folder_can_be_checked_by_sha256sum(tmp_path: Path) -> None:
    """The checksums of a bundle folder are right for `sha256sum -c`, and name every file but themselves."""
    manifest = pack([make(tmp_path / "a")], tmp_path / "b", name="tiny", version="1")
    done = subprocess.run(["sha256sum", "--strict", "-c", "SHA256SUMS"], cwd=tmp_path / "b", capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(digests(tmp_path / "b")) - 1 == len(manifest.files) + 1
    assert (tmp_path / "b" / "selftest.py").stat().st_mode & 0o777 == 0o755


def test_manifest_says_what_a_device_must_know(tmp_path: Path) -> None:
    """The manifest names runtime, entry, signature, roles and tolerances, and no place on the building machine."""
    pack([make(tmp_path / "a")], tmp_path / "b", name="tiny", version="1")
    text = (tmp_path / "b" / "deploytool.json").read_bytes()
    manifest = read_manifest(text, "b")
    (variant,) = manifest.variants
    assert variant.runtime == {"onnxruntime": "1.31.1"} and variant.entry == "model.onnx"
    assert variant.tolerance.cosine_min == 0.9999
    assert {f.path.rpartition("/")[2]: f.role for f in manifest.files} == {
        "model.onnx": "engine", "tokenizer.json": "asset", "artifact.json": "manifest", "report.json": "evidence",
        "selftest.py": "selftest", "000.npz": "golden", "001.npz": "golden", "002.npz": "golden"}  # fmt: skip
    assert str(tmp_path).encode() not in text
    assert manifest.created is None


@pytest.mark.parametrize("kind", ["dir", "tar"])
def test_no_place_on_the_building_machine_is_packed(kind: Literal["dir", "tar"], tmp_path: Path) -> None:
    """No file of a bundle holds the model's path; the packed report fits the packed manifest; so again."""
    place = {"kind": "python", "name": "tiny", "path": str(tmp_path / "tiny.py")}
    artifact = make(tmp_path / "a", model={"name": "tiny", "ref": place, "fingerprint": "f" * 64})
    pack([artifact], tmp_path / "b", name="tiny", version="1", kind=kind)
    texts = {p: p.read_bytes() for p in (tmp_path / "b").rglob("*") if p.is_file()} if kind == "dir" else {
        tmp_path / "b": (tmp_path / "b").read_bytes()}  # fmt: skip
    assert [path for path, text in texts.items() if str(tmp_path).encode() in text] == []
    with opened(tmp_path / "b") as found:
        packed = found["ort"]
        assert packed.model == {"name": "tiny", "fingerprint": "f" * 64} and packed.files == artifact.files
        report, wrong = read_report(packed)
        assert wrong == "" and report is not None and report["status"] == "ok"
        pack([packed], tmp_path / "c", name="tiny", version="1", kind=kind)
    assert verify_bundle(tmp_path / "b") == verify_bundle(tmp_path / "c")
    assert artifact.model["ref"] == place and Artifact.load(artifact.folder) == artifact


def test_an_artifact_without_an_engine_is_not_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What only names its source is refused; in an export's whole output it is left out, which is said."""
    make(tmp_path / "out" / "ort")
    source = make(tmp_path / "out" / "eager", "eager", format="source")
    with pytest.raises(InputRefused, match="must hold engines"):
        pack([source], tmp_path / "b", name="tiny", version="1")
    assert run(["package", str(source.folder), "-o", str(tmp_path / "b")]) == 3
    capsys.readouterr()
    assert run(["package", str(tmp_path / "out"), "-o", str(tmp_path / "b")]) == 0
    assert "eager is left out" in capsys.readouterr().err
    assert [v.target for v in verify_bundle(tmp_path / "b").variants] == ["ort"]


def write_export(out: Path, *artifacts: Artifact, **failed: str) -> None:
    """The report of an export that wrote these, and failed for others."""
    rows = [{"target": a.target["name"], "status": "ok", "artifact_digest": sha256_file(a.folder / "artifact.json")}
            for a in artifacts]  # fmt: skip
    rows += [{"target": name, "status": status, "artifact_digest": None} for name, status in failed.items()]
    (out / "report.json").write_text(json.dumps({"schema_version": "1.0", "model": "tiny", "targets": rows}))


def test_what_an_earlier_export_left_is_said_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one model it is packed and named; of another model, or of a target that failed since, nothing is packed."""
    out, bundle = tmp_path / "out", tmp_path / "b"
    ort = make(out / "ort")
    old = make(out / "old", "old")
    write_export(out, ort)
    assert run(["package", str(out), "-o", str(bundle)]) == 0
    said = capsys.readouterr()
    assert "old is packed too" in said.err and "ort is packed" not in said.err
    assert [line.split()[0] for line in said.out.splitlines() if line.startswith("  ")] == ["old:", "ort:"]
    write_export(out, ort, old="failed")
    assert run(["package", str(out), "-o", str(tmp_path / "c")]) == 3
    assert "old: the last export failed for it" in capsys.readouterr().err
    write_export(out, ort)
    shutil.rmtree(old.folder)
    make(out / "old", "old", model={"name": "tiny", "ref": "tiny.py", "fingerprint": "e" * 64})
    assert run(["package", str(out), "-o", str(tmp_path / "c")]) == 3
    said = capsys.readouterr()
    assert "DT311" in said.err and "old: it is of another model" in said.err and not (tmp_path / "c").exists()
    write_export(out, new="failed")
    assert run(["package", str(out), "-o", str(tmp_path / "c")]) == 3
    said = capsys.readouterr().err
    assert "ort: the last export left no artifact" in said and "packed too" not in said
    assert run(["package", str(ort.folder), "-o", str(tmp_path / "c")]) == 0
    (out / "report.json").write_text("[]")
    assert run(["package", str(out), "-o", str(tmp_path / "d")]) == 3


def test_tar_bytes_depend_on_content_only(tmp_path: Path) -> None:
    """Two tars of equal artifacts, packed in any order in different folders, are byte for byte the same."""
    one, two = make(tmp_path / "one" / "a"), make(tmp_path / "one" / "b", "ort-2")
    shutil.copytree(tmp_path / "one", tmp_path / "other" / "deep")
    again = [Artifact.load(tmp_path / "other" / "deep" / name) for name in ("b", "a")]
    pack([one, two], tmp_path / "first.tar", name="tiny", version="1", kind="tar")
    pack(again, tmp_path / "other" / "second.tar", name="tiny", version="1", kind="tar")
    assert (tmp_path / "first.tar").read_bytes() == (tmp_path / "other" / "second.tar").read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_tar_is_a_plain_tar(tmp_path: Path) -> None:
    """Any tar program reads it: one top folder, regular files, owner 0, time 0, modes 0644 and 0755."""
    pack([make(tmp_path / "a")], tmp_path / "b.tar", name="tiny", version="1.0", kind="tar")
    with tarfile.open(tmp_path / "b.tar", "r:") as tar:
        members = tar.getmembers()
    assert all(m.isreg() and m.name.startswith("tiny-1.0/") for m in members)
    assert [m.name for m in members] == sorted(m.name for m in members)
    assert {(m.uid, m.gid, m.mtime, m.uname) for m in members} == {(0, 0, 0, "")}
    assert {m.mode for m in members} == {0o644, 0o755}


def test_tar_and_folder_hold_the_same(tmp_path: Path) -> None:
    """Unpacking the tar gives the files of the folder bundle."""
    artifact = make(tmp_path / "a")
    pack([artifact], tmp_path / "b", name="tiny", version="1")
    pack([artifact], tmp_path / "b.tar", name="tiny", version="1", kind="tar")
    manifest = unpack(tmp_path / "b.tar", tmp_path / "c")
    assert digests(tmp_path / "b") == digests(tmp_path / "c")
    assert manifest == verify_bundle(tmp_path / "b")


def test_date_comes_from_the_environment_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`created` is SOURCE_DATE_EPOCH in UTC; nonsense there is refused."""
    artifact = make(tmp_path / "a")
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")
    assert pack([artifact], tmp_path / "b", name="tiny", version="1").created == "1970-01-02T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(UsageProblem, match="SOURCE_DATE_EPOCH"):
        pack([artifact], tmp_path / "c", name="tiny", version="1")


def test_long_names_are_refused_or_kept(tmp_path: Path) -> None:
    """A path that needs the header's prefix survives a tar; one that does not fit is refused by name."""
    folder = tmp_path / "a"
    artifact = make(folder)
    (folder / ("d" * 60)).mkdir()
    (folder / ("d" * 60) / ("e" * 90)).write_text("deep")
    write_report(artifact.save())
    pack([Artifact.load(folder)], tmp_path / "b.tar", name="tiny", version="1", kind="tar")
    assert unpack(tmp_path / "b.tar", tmp_path / "c")
    (folder / ("f" * 110)).write_text("long")
    write_report(artifact.save())
    with pytest.raises(InputRefused, match="must be shorter"):
        pack([Artifact.load(folder)], tmp_path / "c.tar", name="tiny", version="1", kind="tar")
    assert not (tmp_path / "c.tar").exists()


def test_only_what_was_proved_is_packed(tmp_path: Path) -> None:
    """Changed files, failed parity, a foreign, missing or stale report and missing cases each stop the packing."""

    def attempt(artifact: Artifact) -> None:
        pack([artifact], tmp_path / "bundle", name="tiny", version="1")

    artifact = make(tmp_path / "changed")
    (artifact.folder / "model.onnx").write_bytes(b"other")
    with pytest.raises(IntegrityBroken, match="unchanged"):
        attempt(artifact)
    artifact = make(tmp_path / "failed")
    write_report(artifact, passed=False)
    with pytest.raises(CheckFailed):
        attempt(artifact)
    artifact = make(tmp_path / "stale")
    report = json.loads((artifact.folder / "report.json").read_text())
    (artifact.folder / "report.json").write_text(json.dumps({**report, "artifact_digest": "0" * 64}))
    with pytest.raises(IntegrityBroken, match="belong"):
        attempt(artifact)
    (artifact.folder / "report.json").unlink()
    with pytest.raises(InputRefused, match=r"report\.json"):
        attempt(artifact)
    write_report(artifact)
    (artifact.folder / "report.json").write_text((artifact.folder / "report.json").read_text()[:-1] + ', "x": NaN}')
    with pytest.raises(InputRefused, match="must be JSON"):
        attempt(artifact)
    artifact = make(tmp_path / "bare")
    shutil.rmtree(artifact.folder / "golden")
    artifact = artifact.save()
    write_report(artifact)
    with pytest.raises(InputRefused, match="recorded cases"):
        attempt(artifact)
    assert not (tmp_path / "bundle").exists()


def test_variants_are_of_one_model_and_of_different_targets(tmp_path: Path) -> None:
    """Two models, or one target twice, do not go into one bundle."""
    one, same = make(tmp_path / "one"), make(tmp_path / "same")
    other = make(tmp_path / "other", "ort-2", model={"name": "tiny", "fingerprint": "0" * 64})
    with pytest.raises(UsageProblem, match="one artifact per target"):
        pack([one, same], tmp_path / "b", name="tiny", version="1")
    with pytest.raises(InputRefused, match="one model"):
        pack([one, other], tmp_path / "b", name="tiny", version="1")
    with pytest.raises(UsageProblem, match="at least one"):
        pack([], tmp_path / "b", name="tiny", version="1")


def test_nothing_but_a_bundle_is_overwritten(tmp_path: Path) -> None:
    """An existing bundle stays unless overwriting is asked for; another folder stays even then."""
    artifact = make(tmp_path / "a")
    for kind, out in (("dir", tmp_path / "b"), ("tar", tmp_path / "b.tar")):
        pack([artifact], out, name="tiny", version="1", kind=kind)  # type: ignore[arg-type]
        with pytest.raises(UsageProblem, match="must not exist"):
            pack([artifact], out, name="tiny", version="2", kind=kind)  # type: ignore[arg-type]
        pack([artifact], out, name="tiny", version="2", kind=kind, overwrite=True)  # type: ignore[arg-type]
        assert verify_bundle(out).version == "2"
    with pytest.raises(UsageProblem, match="earlier output"):
        pack([artifact], tmp_path / "a", name="tiny", version="1", overwrite=True)
    with pytest.raises(UsageProblem, match="earlier output"):
        unpack(tmp_path / "b", tmp_path / "a", overwrite=True)
    artifact.check()
    assert unpack(tmp_path / "b.tar", tmp_path / "b", overwrite=True).version == "2"


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "x" * 65])
def test_labels_are_plain(tmp_path: Path, name: str) -> None:
    """A bundle's name and version can't hold what a path or a shell would read."""
    with pytest.raises(UsageProblem):
        pack([], tmp_path / "b", name=name, version="1")
    with pytest.raises(UsageProblem):
        pack([], tmp_path / "b", name="tiny", version=name)


def test_artifacts_are_found_wherever_they_lie(tmp_path: Path) -> None:
    """An artifact, an export folder, a bundle folder and a tar all open as artifacts by target."""
    one, two = make(tmp_path / "out" / "a"), make(tmp_path / "out" / "b", "ort-2")
    pack([one, two], tmp_path / "b", name="tiny", version="1")
    pack([one, two], tmp_path / "b.tar", name="tiny", version="1", kind="tar")
    for path in (tmp_path / "out", tmp_path / "b", tmp_path / "b.tar"):
        with opened(path) as found:
            assert sorted(found) == ["ort", "ort-2"]
            found["ort"].check()
    with opened(one.folder) as found:
        assert list(found) == ["ort"]
    with pytest.raises(InputRefused, match="got none"), opened(tmp_path / "nowhere"):
        pass


@pytest.mark.parametrize("name", ["model.py", "model.onnx"])
def test_a_model_is_no_artifact(name: str, tmp_path: Path) -> None:
    """Whoever names a model where an artifact must stand is told how to build it, not that a tar is broken."""
    (tmp_path / name).write_bytes(b"import torch")
    with pytest.raises(InputRefused, match=rf"got a model.*\n.*export .*{name}"), opened(tmp_path / name):
        raise AssertionError("opened")


def test_an_artifact_that_lost_its_manifest_is_not_left_out(tmp_path: Path) -> None:
    """A folder with recorded cases and no artifact.json must be refused by name: the others would pass without it."""
    make(tmp_path / "out" / "a")
    (make(tmp_path / "out" / "b", "ort-2").folder / "artifact.json").unlink()
    with pytest.raises(InputRefused, match=r"must hold artifact\.json \(got .*out/b\)"), opened(tmp_path / "out"):
        pass


def test_inspecting_a_tar_tells_places_in_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `inspect` says of a tar names the folder inside it, not a temporary one that is gone."""
    pack([make(tmp_path / "a")], tmp_path / "b.tar", name="tiny", version="1", kind="tar")
    assert run(["inspect", str(tmp_path / "b.tar"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert found["folder"] == "variants/ort"
    assert run(["inspect", str(tmp_path / "a"), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert found["folder"] == str(tmp_path / "a")


@pytest.mark.parametrize("kind", ["dir", "tar"])
def test_inspecting_a_bundle_tells_its_name_and_version(
    kind: Literal["dir", "tar"], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `inspect` says of a bundle must begin with its name and version; of an artifact there is neither."""
    pack([make(tmp_path / "a")], tmp_path / "b", name="tiny", version="1.2", kind=kind)
    assert run(["inspect", str(tmp_path / "b")]) == 0
    assert capsys.readouterr().out.startswith("bundle tiny 1.2\nort: ")
    assert run(["inspect", str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] == {"name": "tiny", "version": "1.2"}
    assert run(["inspect", str(tmp_path / "a"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bundle"] is None


def test_inspecting_a_changed_file_tells_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file that is not the recorded one must be a line below what else is shown, with exit code 6; whole ones not."""
    folder = make(tmp_path / "a").folder
    assert run(["inspect", str(folder)]) == 0 and "damaged" not in capsys.readouterr().out
    path = folder / "golden" / "001.npz"
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    (folder / "more.bin").write_bytes(b"-")
    assert run(["inspect", str(folder)]) == 6
    assert capsys.readouterr().out.splitlines()[-2:] == ["ort: damaged: added: more.bin",
                                                         "ort: damaged: changed: golden/001.npz"]  # fmt: skip
    assert run(["inspect", str(folder), "--json"]) == 6
    (found,) = json.loads(capsys.readouterr().out)["artifacts"]
    assert found["findings"] == ["damaged: added: more.bin", "damaged: changed: golden/001.npz"]


@pytest.mark.parametrize("which", ["candidate", "released", "bundle"])
def test_the_gate_says_damage_by_one_exit_code(
    which: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A changed file of the candidate, of a released folder or of a released bundle: 6, and its name, for all three."""
    candidate, released = (make(tmp_path / name) for name in ("candidate", "released"))
    pack([released], tmp_path / "bundle", name="tiny", version="1")
    folder = tmp_path / which / ("variants/ort" if which == "bundle" else "")
    (folder / "golden" / "001.npz").write_bytes(b"other")
    against = tmp_path / ("bundle" if which == "bundle" else "released")
    assert run(["check", str(candidate.folder), "--against", str(against), "--no-latency", "-q"]) == 6
    told = capsys.readouterr()
    assert "golden/001.npz" in (told.err if which == "bundle" else told.out)

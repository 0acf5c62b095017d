"""The compressed folder on disk: smaller for zeros, bit-identical, and whole or not there when the disk is full."""

from __future__ import annotations

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch

from deploytool.cli.main import run
from deploytool.compress.run import compress_job
from deploytool.errors import EnvironmentLacking, InputRefused
from deploytool.load.compressed import WEIGHTS, state_sha256
from deploytool.load.model import open_source
from deploytool.load.resolve import resolve
from deploytool.report.compression import compression_page

HALF = '[[compress]]\nstep = "magnitude"\nsparsity = 0.5\n'
LESS = '[[compress]]\nstep = "magnitude"\nsparsity = 0.01\n'


def _job(folder: Path, text: str, name: str, **options: bool) -> Path:
    recipe = folder / f"{name}.toml"
    recipe.write_text(text)
    ref = resolve("digits")
    report = compress_job(dataclasses.asdict(ref), str(recipe), str(folder / name), evaluate=False, **options)
    assert report["stored_bytes"] == (folder / name / WEIGHTS).stat().st_size
    return folder / name


def test_half_zeros_make_a_small_file_that_opens_to_the_same_bits(tmp_path: Path) -> None:
    """At 50 % zeros the file must be at most 0.62 of the dense weights, and the module the same bit for bit."""
    folder = _job(tmp_path, HALF, "half")
    source = open_source(resolve(str(folder)))
    dense = sum(t.numel() * t.element_size() for t in source.module.state_dict().values())
    assert (folder / WEIGHTS).stat().st_size <= 0.62 * dense
    again = _job(tmp_path, HALF, "again")
    assert (again / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert state_sha256(open_source(resolve(str(again))).module) == state_sha256(source.module)
    pruned = source.module.get_parameter("blocks.0.up.weight")
    assert int((pruned == 0).sum()) == pruned.numel() // 2
    assert torch.equal(source.masks["blocks.0.up.weight"], pruned != 0)


def test_the_report_tells_dense_and_stored_bytes_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zeros show in the bytes of the file and not in those of the tensors: in the folder, the output and the table."""
    monkeypatch.chdir(tmp_path)
    Path("half.toml").write_text(HALF)
    assert run(["compress", "digits", "--recipe", "./half.toml", "-o", "half", "--no-quality"]) == 0
    report = json.loads(Path("half/compressed.json").read_text())["report"]
    assert report["after"]["size_bytes"] == report["before"]["size_bytes"]
    stored = Path("half", WEIGHTS).stat().st_size
    assert report["stored_bytes"] == stored <= 0.65 * report["before"]["size_bytes"]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("stored ")]
    assert line.split()[1] == str(stored)
    assert any(f"stored in {stored / 1e6:.3f} MB" in line for line in compression_page(report).grid.lines)


def test_a_description_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Packed tensors of another shape, and bytes that are not there, must be refused when the folder is opened."""
    folder = _job(tmp_path, HALF, "half")
    document = json.loads((folder / "compressed.json").read_text())
    for name, change in (("blocks.0.up.weight", {"shape": [3, 3]}), ("missing", {})):
        how = {**document["packed"]["blocks.0.up.weight"], **change}
        (folder / "compressed.json").write_text(json.dumps({**document, "packed": {**document["packed"], name: how}}))
        with pytest.raises(InputRefused) as caught:
            open_source(resolve(str(folder)))
        assert caught.value.code == "DT314"


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """When writing fails half-way there must be one clear error, the old folder must stay and no remains of the new."""
    folder = _job(tmp_path, HALF, "out")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "out.toml").write_text(LESS)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(EnvironmentLacking) as caught:
            compress_job(dataclasses.asdict(resolve("digits")), str(tmp_path / "out.toml"), str(folder), evaluate=False,
                         overwrite=True)  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.code == "DT403" and caught.value.exit_code == 4
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.toml"]

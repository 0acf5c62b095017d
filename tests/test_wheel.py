"""The wheel: what lands in site-packages, and that it works without the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a freshly built wheel, as an installer would lay it."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(CHECKOUT)],
                   check=True, capture_output=True)  # fmt: skip
    (wheel,) = out.glob("*.whl")
    site = out / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    return site


def _run(site: Path, folder: Path, *arguments: str) -> bytes:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-m", "deploytool", *arguments], cwd=folder, env=environment, check=True,
                          capture_output=True)  # fmt: skip
    return done.stdout


def test_only_the_package_lands_in_site_packages(unpacked: Path) -> None:
    """Nothing called models, targets or tests may lie beside the package; every shipped file must be in it."""
    top = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert top == {"deploytool"}
    for kind in ("targets", "models"):
        there = {p.relative_to(CHECKOUT) for p in (CHECKOUT / kind).rglob("*.*") if "__pycache__" not in p.parts}
        inside = unpacked / "deploytool" / "_shipped"
        assert {p.relative_to(inside) for p in (inside / kind).rglob("*.*")} == there
    assert (unpacked / "deploytool" / "py.typed").is_file()
    assert list(unpacked.glob("*.dist-info/licenses/LICENSE"))


def test_shipped_names_work_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """Targets, models and recipes must be found inside the installed package, not in the checkout."""
    listed = json.loads(_run(unpacked, tmp_path, "targets", "list", "--json"))
    assert {row["name"] for row in listed["targets"]} == {p.stem for p in (CHECKOUT / "targets").glob("*.toml")}
    arguments = ("compress", "digits", "--recipe", "digits-svd", "-o", "x", "--dry-run", "--json")
    plan = json.loads(_run(unpacked, tmp_path, *arguments))["plan"]
    assert Path(plan["model"]["path"]) == unpacked / "deploytool/_shipped/models/digits.py"
    assert Path(plan["recipe"]) == unpacked / "deploytool/_shipped/models/recipes/digits-svd.toml"


def test_the_demo_model_runs_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """A shipped model with its weights must export from the wheel."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    _run(unpacked, tmp_path, "export", "digits", "--target", "eager", "--no-bench", "--no-quality", "-o", "out")
    assert json.loads((tmp_path / "out" / "report.json").read_text())["targets"][0]["status"] == "ok"

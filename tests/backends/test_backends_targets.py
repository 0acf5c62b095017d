"""The shipped profiles, and what is said of a wrong one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

import deploytool.backends
from deploytool.backends.base import BACKENDS, find_backend, load_checked_target
from deploytool.errors import UsageProblem
from deploytool.target import target_names

FOLDER = Path(deploytool.backends.__file__).parent


@pytest.mark.parametrize("name", target_names())
def test_shipped_profiles_are_whole(name: str) -> None:
    """Every shipped profile must load, carry its file's name, and name a backend and a plain sibling that exist.

    What is not fp32 must have such a sibling: TensorRT's is in fp16, which on GPUs is what fewer bits must beat.
    """
    target = load_checked_target(name)
    assert target.name == name
    assert target.backend in BACKENDS
    widths = ("fp32", "fp16", "bf16") if target.backend == "tensorrt" else ("fp32",)
    assert (target.precision not in widths) == (target.plain is not None)
    if target.plain:
        plain = load_checked_target(target.plain)
        assert plain.precision in widths
        assert plain.plain is None
        assert plain.parity.cosine_min > target.parity.cosine_min


def test_every_backend_has_a_file_and_a_profile() -> None:
    """The table of backends, the files that hold a BACKEND and the shipped profiles must agree."""
    files = {path.stem for path in FOLDER.glob("*.py") if "\nBACKEND = " in path.read_text(encoding="utf-8")}
    assert files == set(BACKENDS)
    assert files == {load_checked_target(name).backend for name in target_names()}


def test_all_errors_of_a_profile_are_told_at_once(tmp_path: Path) -> None:
    """A profile with several mistakes must give one sentence for each, with its line and the nearest known key."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "onnxruntime"\nprecison = "int8"\n\n'
        "[parity]\ncosine_min = 2.0\n\n[runtime]\nthread = 2\n"
    )
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(path))
    text = str(caught.value)
    for line, word in ((4, "'precision'"), (7, "cosine_min"), (10, "'threads'")):
        assert f"{path}:{line}: " in text
        assert word in text
    assert "missing key 'precision'" in text


def test_errors_of_the_build_table_have_lines_too(tmp_path: Path) -> None:
    """Keys and values that the backend does not know must be told with file, line and the nearest known key."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "onnxruntime"\nprecision = "int8"\n'
        '[parity]\ncosine_min = 0.9\n[build]\nkeep_fp23 = 2\noptimization = "most"\n'
    )
    with pytest.raises(UsageProblem) as caught:
        load_checked_target(str(path))
    assert f"{path}:8: unknown key 'build.keep_fp23'; did you mean 'keep_fp32'?" in str(caught.value)
    assert f"{path}:9: 'build.optimization'" in str(caught.value)


def test_sizes_of_a_profile_are_ordered(tmp_path: Path) -> None:
    """An engine's size range must hold min <= opt <= max."""
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\ndescription = "x"\nbackend = "tensorrt"\nprecision = "fp16"\n'
        "[parity]\ncosine_min = 0.9\n[build.profile.batch]\nmin = 4\nopt = 2\nmax = 8\n"
    )
    with pytest.raises(UsageProblem, match="1 error") as caught:
        load_checked_target(str(path))
    assert "min <= opt <= max" in str(caught.value)


def test_an_unknown_backend_is_told() -> None:
    """A backend that does not exist must be an error that names the nearest one."""
    with pytest.raises(UsageProblem) as caught:
        find_backend("onxruntime")
    assert "'onnxruntime'" in str(caught.value)


@pytest.mark.parametrize("refusal", [ModuleNotFoundError("no"), ValueError("openvino.__spec__ is None"), None])
def test_a_package_that_can_not_be_found_is_missing(refusal: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that the import system does not find must be said to be missing, in whatever way that says so."""

    def find_spec(name: str) -> None:
        if refusal is not None:
            raise refusal

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    probe = find_backend("openvino").probe(load_checked_target("openvino"))
    assert not probe.available and "openvino" in probe.reason and probe.fix == "pip install 'deploytool[openvino]'"

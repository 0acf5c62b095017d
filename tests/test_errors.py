"""The table of error codes against the source."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deploytool import errors
from deploytool.errors import (
    CODES,
    FIXES,
    BackendFailed,
    CheckFailed,
    DeployError,
    IntegrityBroken,
    counted,
    from_json,
    nearest,
)

SOURCE = Path(errors.__file__).parent
RAISED = re.compile(r"\b(\w+)\(\s*\"(DT\d{3})\"")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, DeployError)]


def _in_source() -> dict[str, set[str]]:
    """Codes that stand in the source, each with its files; the table itself is left out."""
    found: dict[str, set[str]] = {}
    for path in SOURCE.rglob("*.py"):
        if path.name != "errors.py":
            for code in re.findall(r"\"(DT\d{3})\"", path.read_text(encoding="utf-8")):
                found.setdefault(code, set()).add(path.name)
    return found


def test_every_code_is_explained_and_every_explained_code_is_used() -> None:
    """CODES must hold exactly the codes that the source uses, or `deploytool explain` lies."""
    assert set(_in_source()) == set(CODES)


def test_the_first_digit_is_the_exit_code() -> None:
    """An error raised as a class must carry a code of that class's exit code (9 for our own bugs)."""
    by_name = {kind.__name__: kind for kind in KINDS}
    wrong = []
    for path in SOURCE.rglob("*.py"):
        for name, code in RAISED.findall(path.read_text(encoding="utf-8")):
            kind = by_name.get(name)
            if kind and int(code[2]) != {70: 9}.get(kind.exit_code, kind.exit_code):
                wrong.append(f"{path.name}: {name}({code})")
    assert wrong == []


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_survives_the_way_through_a_pipe(kind: type[DeployError]) -> None:
    """An error written as data by a worker must come back as the same class with the same content."""
    error = kind("DT305", "it must be so (got otherwise)", detail=["known"], fix="do this")
    again = from_json(error.to_json())
    if kind is not DeployError:
        assert type(again) is kind
    assert again.to_json()["message"] == error.message
    assert (again.code, again.detail, again.fix) == (error.code, error.detail, error.fix)


def test_some_codes_always_say_what_to_do() -> None:
    """Where the raiser knows nothing better the code's own help must be said; its own words must stand."""
    assert set(FIXES) <= set(CODES)
    bare = IntegrityBroken("DT601", "it must be whole (got otherwise)")
    assert str(bare).endswith(f"\n  help: {FIXES['DT601']}") and bare.to_json()["fix"] == FIXES["DT601"]
    assert IntegrityBroken("DT601", "so", fix="do this").fix == "do this"
    assert CheckFailed("DT101", "so").fix is None


def test_numbers_have_their_nouns() -> None:
    """One is no plural."""
    assert [counted(n, noun) for n, noun in ((1, "variant"), (0, "file"), (2, "entry"), (1, "entry"))] == [
        "1 variant", "0 files", "2 entries", "1 entry"]  # fmt: skip


def test_exit_codes_differ() -> None:
    """Every class must have its own exit code, none of them 0."""
    codes = [kind.exit_code for kind in KINDS if kind is not DeployError]
    assert len(set(codes)) == len(codes) and 0 not in codes
    assert (CheckFailed.exit_code, BackendFailed.exit_code) == (1, 5)


def test_nearest_names_the_near_one_or_all() -> None:
    """A typing slip must be answered with the one name meant, anything else with all names."""
    assert nearest("opnvino", ["ort", "openvino"]) == "did you mean 'openvino'?"
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", []) == "known: none"

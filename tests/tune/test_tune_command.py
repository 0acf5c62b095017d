"""The command, its mistakes, and the files that a search leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from deploytool.backends.base import load_checked_target
from deploytool.bench import energy
from deploytool.cli.main import run
from deploytool.report.table import grid_table
from deploytool.settings import read_toml
from deploytool.target import load_target
from deploytool.tune.front import front, plot, tune_grid
from deploytool.tune.project import profile_of, toml_text
from deploytool.tune.space import Config


def one(name: str, time: float, size: int, drop: float | None, status: str = "fit") -> dict[str, object]:
    return {"name": name, "status": status, "relative_time": time, "size_bytes": size, "drop": drop,
            "p50_ms": {"s": 1.0}, "peak_rss_bytes": None, "reason": None}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--budget", "soon"], 2, "must be a time above 0"),
        (["--budget", "0m"], 2, "must be a time above 0"),
        (["--max-drop", "101%"], 2, "from 0 to 1"),
        (["--max-drop", "x%"], 2, "from 0 to 1"),
        (["--max-drop", "1"], 2, "write 1% or 100%"),
        (["--at", "batch=0"], 2, "must be sizes such as"),
        (["--at", "batch"], 2, "must be sizes such as"),
        (["--objective", "beauty"], 2, "'beauty' is not one of"),
        (["--recipe", "digits-prun"], 2, "did you mean 'digits-prune'?"),
        (["--target", "opnvino"], 2, "did you mean 'openvino'?"),
        (["-o", "mine"], 2, "choose another -o, or remove it yourself"),  # --overwrite is no option of it
        (["--objective", "energy"], 4, "no RAPL zone"),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A mistake gives the documented exit code and says what is wrong; energy is refused where none can be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(energy.Meter.__init__, "__defaults__", (tmp_path,))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("mine")
    assert run(["tune", "digits", "--target", "ort", *arguments]) == code
    assert said in capsys.readouterr().err
    assert not (tmp_path / "deploytool-tune").exists()


def test_a_dry_run_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan tells what will be searched, shares and times in plain numbers, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    asked = ["-t", "ort", "-t", "ort-int8", "--max-drop", "0.5%", "--budget", "1.5h", "-r", "digits-svd"]
    assert run(["tune", "digits", *asked, "--at", "batch=1", "--at", "batch=8", "--json", "-n"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    assert (plan["max_drop"], plan["budget_seconds"], plan["configurations"]) == (0.005, 5400.0, 4)
    assert (plan["buckets"], plan["recipes"]) == (["batch=1", "batch=8"], ["digits-svd"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["ort-int8", "openvino-int8", "trt", "fbgemm"])
def test_a_profile_is_written_as_it_was_found(name: str, tmp_path: Path) -> None:
    """The written profile is read again as the same target, with the settings that were found."""
    config = Config(load_target(name)).with_change("runtime.threads", 2)
    profile = profile_of(config, 0.03)
    path = tmp_path / "chosen.toml"
    path.write_text(toml_text(profile.model_dump(mode="json", exclude_none=True)))
    assert load_checked_target(str(path)) == profile
    assert profile.runtime.threads == 2 and profile.parity.metric_drop_max == 0.03


def test_toml_survives_odd_text(tmp_path: Path) -> None:
    """Quotes, line ends and names with dots come back as they were."""
    data = {"a": 'say "x"\n\\', "t": {"k.l": [1, 2.5, True], "in": {"b": "é"}}}
    (tmp_path / "x.toml").write_text(toml_text(data), encoding="utf-8")
    assert read_toml(tmp_path / "x.toml")[0] == data


def test_the_front() -> None:
    """On the front stands what keeps the quality and is not beaten in time, size and drop at once."""
    found = [one("quick", 0.5, 100, 0.01), one("small", 0.9, 50, 0.0), one("worse", 0.95, 100, 0.02),
             one("lossy", 0.1, 10, 0.5, "refused"), one("unknown", 0.2, 20, None, "not evaluated")]  # fmt: skip
    assert front(found) == ["quick", "small"]
    result = {"configurations": found, "front": front(found), "chosen": found[0], "anchor": "small", "findings": []}
    table = grid_table(tune_grid(result)).splitlines()
    assert table[2].startswith("quick") and "chosen" in table[2] and "yes" in table[2]


@pytest.mark.parametrize("timed", [True, False])
def test_the_picture(timed: bool) -> None:
    """Both axes say what they are and from where to where, each point stands in its place, the front's are joined.

    Where nothing was timed the drop takes the place of the time; what was not evaluated has none and is not drawn.
    """
    found = [one("quick", 0.5, 4_000_000, 0.0), one("a & b", 1.0, 1_000_000, 0.02),
             one("worse", 0.707107, 4_000_000, 0.01), one("new", 2.0, 16_000_000, None, "not evaluated")]  # fmt: skip
    if not timed:
        found = [{**configuration, "relative_time": None, "p50_ms": {}} for configuration in found]
    result = {"configurations": found, "front": front(found), "chosen": found[1], "anchor": "a & b" if timed else None}
    root = ElementTree.fromstring(plot(result))
    texts = [node.text for node in root.iter() if node.tag.endswith("}text")]
    circles = {node[0].text: (float(node.attrib["cx"]), float(node.attrib["cy"]), node.attrib["r"])
               for node in root.iter() if node.tag.endswith("}circle")}  # fmt: skip
    (line,) = [node.attrib["points"] for node in root.iter() if node.tag.endswith("}polyline")]
    if timed:
        assert texts[:2] == ["time of a run, relative to a & b (0.5 to 2)", "size, MB (1 to 16)"]
        assert circles == {"quick": (60, 210, "4"), "a & b": (360, 360, "7"), "worse": (210, 210, "4"),
                           "new": (660, 60, "4")}  # fmt: skip
        assert line == "360.0,360.0 60.0,210.0"
    else:
        assert texts[:2] == ["drop of the quality, % (0 to 2)", "size, MB (1 to 4)"]
        assert circles == {"quick": (60, 60, "4"), "a & b": (660, 360, "7"), "worse": (360, 60, "4")}
        assert line == "660.0,360.0 60.0,60.0"
    assert sorted(texts[2:]) == ["a & b", "quick"]
    assert plot({**result, "configurations": []}) == ""
    assert (plot({**result, "configurations": found[3:]}) == "") is not timed

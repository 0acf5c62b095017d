#!/usr/bin/env python
"""What `deploytool tune` finds, and at what cost, against trying every configuration that it could have tried.

The search runs in a fresh folder. Then every combination of the settings is built, checked and timed by `--exhaustive`
in a copy of that folder, with four times as many rounds each, and its own best are timed against each other again.
Last, the search's pick is timed against the pick of that and against every target as `export` makes it: at each size
all of them interleaved, in several sets of fresh processes, since what looked best among many was lucky too.

Prints JSON: seconds of both; `time` is the pick's time over that of each rival per size, with its 95 % interval and the
verdict on the pick; `regret` is how much longer it takes than the pick of all (geometric mean over the sizes),
`worst_of_export` the same against the quickest target of `export` that is not known to lose too much, and
`worst_cell_of_plain` the largest ratio to an fp32 target at any size. `share_of_time` is the search's part of the
seconds of trying all, and `share_with_short_races` the same if those had raced for as few rounds as the search's. What
was measured in --work is not measured again.

    python scripts/bench/tune.py --model minilm --max-drop 0.5% --at batch=1,sequence=16 --at batch=1,sequence=64 \
        --at batch=1,sequence=128 --targets ort ort-int8 openvino openvino-int8 fbgemm torchscript --work /tmp/tuned
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from deploytool.artifact import Artifact
from deploytool.bench.compare import compare
from deploytool.bench.statistics import center, speedup
from deploytool.storage import write_json
from deploytool.tune.search import _EXHAUSTIVE_ROUNDS, _RACE_ROUNDS
from deploytool.worker import NO_LIMITS

EVERY = "the pick of all"


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--targets", nargs="+", default=["ort", "ort-int8", "openvino", "torchscript", "fbgemm"])
    parser.add_argument("--max-drop", default="0.5%")
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--at", action="append", required=True)
    parser.add_argument("--seconds", type=float, default=120.0, help="for the last timing, at each size")
    parser.add_argument("--lives", type=int, default=5, help="sets of fresh processes that share these seconds")
    parser.add_argument("--work", type=Path, required=True, help="a folder of its own")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    search, every = given.work / "search", given.work / "every"
    found = once(given.work / "search.json", lambda: tune(given, search))
    if not (given.work / "every.json").exists():
        shutil.copytree(search, every)
    whole = once(given.work / "every.json", lambda: tune(given, every, "--exhaustive"))
    rivals = {EVERY: every / "chosen"} | exported(given, given.work / "export")
    times = once(given.work / "times.json", lambda: timed(search, rivals, given.seconds, given.lives))
    races = seconds_of("race", every) - seconds_of("race", search)
    print(json.dumps(summary(found, whole, races, times), indent=2))


def once(path: Path, measure: Callable[[], Any]) -> Any:
    """What was measured, kept in a file."""
    if not path.exists():
        write_json(path, measure())
    return json.loads(path.read_text(encoding="utf-8"))


def seconds_of(kind: str, folder: Path) -> float:
    """What the record says that work of this kind took."""
    with closing(sqlite3.connect(folder / "tune.sqlite")) as record:
        return float(record.execute("SELECT total(seconds) FROM done WHERE kind = ?", (kind,)).fetchone()[0])


def tune(given: argparse.Namespace, out: Path, *more: str) -> dict[str, Any]:
    """One run of the command: its document, and the seconds of the whole command."""
    command = [sys.executable, "-m", "deploytool", "tune", given.model, "--max-drop", given.max_drop, "--budget",
               given.budget, "--bench-seconds", "0", "--json", "-o", str(out), *more]  # fmt: skip
    for target in given.targets:
        command += ["--target", target]
    for sizes in given.at:
        command += ["--at", sizes]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return {"document": json.loads(done.stdout), "seconds": time.monotonic() - started}


def exported(given: argparse.Namespace, out: Path) -> dict[str, Path]:
    """The targets as `export` makes them; those that it refuses are no rivals."""
    if not (out / "report.json").exists():
        command = [sys.executable, "-m", "deploytool", "export", given.model, "--no-bench", "--overwrite", "-o",
                   str(out), *(word for target in given.targets for word in ("--target", target))]  # fmt: skip
        subprocess.run(command, stdout=sys.stderr)
    return {target: out / target for target in given.targets if (out / target).is_dir()}


def timed(search: Path, rivals: dict[str, Path], seconds: float, lives: int) -> dict[str, dict[str, Any]]:
    """Per rival and size: the pick's time over the rival's, over so many lives of their processes.

    The lives' ratios are what the estimate, its interval (None of too few) and the verdict are of: in all blocks of one
    life the same process may be the lucky one.
    """
    pick = Artifact.load(search / "chosen")
    others = {name: Artifact.load(folder) for name, folder in rivals.items()}
    found: dict[str, dict[str, Any]] = {name: {} for name in others}
    for case in sorted((search / "cases").glob("*.npz")):
        ratios: dict[str, list[float]] = {name: [] for name in others}
        for life in range(lives):
            result = compare(pick, others, case, limits=NO_LIMITS, budget_seconds=seconds / lives, seed=life,
                             report=lambda line: print(line, file=sys.stderr))  # fmt: skip
            for name, figures in result["against"].items():
                ratios[name].append(math.log(figures["speedup"]))
        for name, values in ratios.items():
            of_lives = speedup(values, seed=0)
            found[name][case.stem] = {
                "ratio": math.exp(-center(values)), "lives": [math.exp(-value) for value in values],
                "interval": of_lives and [1 / of_lives.high, 1 / of_lives.low],
                "verdict": of_lives and of_lives.verdict(),
            }  # fmt: skip
    return found


def summary(found: dict[str, Any], whole: dict[str, Any], races: float, times: dict[str, Any]) -> dict[str, Any]:
    """The comparison; `races` are the seconds of the long races. `every_seconds` holds the search's own work too."""
    first, second = found["document"], whole["document"]
    status = {c["name"]: c["status"] for c in second["configurations"]}
    good = [name for name in times if name == EVERY or status.get(name) != "refused"]
    overall = {name: math.exp(sum(math.log(t["ratio"]) for t in times[name].values()) / len(times[name]))
               for name in good}  # fmt: skip
    longer = (1 - _RACE_ROUNDS / _EXHAUSTIVE_ROUNDS) * races
    plain = [name for name in good if name in ("ort", "openvino", "torchscript")]
    return {
        "model": second["model"], "environment": second["environment"], "buckets": second["buckets"],
        "configurations": len(second["configurations"]), "tried_by_search": len(first["configurations"]),
        "search_seconds": found["seconds"], "every_seconds": second["spent_seconds"],
        "share_of_time": found["seconds"] / second["spent_seconds"],
        "share_with_short_races": found["seconds"] / (second["spent_seconds"] - longer),
        "pick": first["chosen"]["name"], "pick_of_all": second["chosen"]["name"], "drop": first["chosen"]["drop"],
        "time": times, "refused": sorted(set(times) - set(good)),
        "regret": overall[EVERY] - 1,
        "worst_of_export": max((overall[name] - 1 for name in good if name != EVERY), default=None),
        "worst_cell_of_plain": max((t["ratio"] for name in plain for t in times[name].values()), default=None),
    }  # fmt: skip


if __name__ == "__main__":
    main()

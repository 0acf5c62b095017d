#!/usr/bin/env python
"""What `deploytool tune` finds, and at what cost, against trying every configuration that it could have tried.

The search runs in a fresh folder. Then every combination of the settings is built, checked and timed by `--exhaustive`
in a copy of that folder, with four times as many rounds each. Prints JSON: seconds of both, the pick, the regret (how
much longer the pick takes than the best of all, geometric mean over the buckets, both by the rounds of the second
run), per bucket the regret against whatever is the best there, and the pick against the best unquantized artifact.

    python scripts/bench/tune.py --model minilm --max-drop 0.5% --at batch=1,sequence=16 --at batch=1,sequence=64 \
        --at batch=1,sequence=128 --targets ort ort-int8 openvino openvino-int8 fbgemm torchscript --work /tmp/tuned
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Parse, measure both, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--targets", nargs="+", default=["ort", "ort-int8", "openvino", "torchscript", "fbgemm"])
    parser.add_argument("--max-drop", default="0.5%")
    parser.add_argument("--budget", default="20m")
    parser.add_argument("--at", action="append", default=[])
    parser.add_argument("--work", type=Path, required=True, help="a folder that does not exist yet")
    given = parser.parse_args()
    given.work.mkdir(parents=True)
    search, every = given.work / "search", given.work / "every"
    found, seconds = tune(given, search)
    shutil.copytree(search, every)
    whole, _ = tune(given, every, "--exhaustive")
    print(json.dumps(summary(found, whole, seconds), indent=2))


def tune(given: argparse.Namespace, out: Path, *more: str) -> tuple[dict[str, Any], float]:
    """One run of the command; its document, and the seconds of the whole command."""
    command = [sys.executable, "-m", "deploytool", "tune", given.model, "--max-drop", given.max_drop, "--budget",
               given.budget, "--bench-seconds", "0", "--json", "-o", str(out), *more]  # fmt: skip
    for target in given.targets:
        command += ["--target", target]
    for sizes in given.at:
        command += ["--at", sizes]
    started = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout), time.monotonic() - started


def summary(found: dict[str, Any], whole: dict[str, Any], seconds: float) -> dict[str, Any]:
    """The comparison. `every_seconds` holds the search's own work too, which the second run did not do again."""
    fit = {c["name"]: c for c in whole["configurations"] if c["status"] != "refused" and c["relative_time"]}
    pick = fit[found["chosen"]["name"]]
    good = [c for c in fit.values() if c["status"] == "fit"]
    best = min(good, key=lambda c: c["relative_time"])
    plain = min((c for c in fit.values() if c["target"] in ("ort", "openvino", "torchscript")),
                key=lambda c: c["relative_time"])  # fmt: skip
    return {
        "model": whole["model"], "environment": whole["environment"], "buckets": whole["buckets"],
        "configurations": len(whole["configurations"]), "tried_by_search": len(found["configurations"]),
        "search_seconds": seconds, "every_seconds": whole["spent_seconds"],
        "share_of_time": seconds / whole["spent_seconds"],
        "pick": pick["name"], "best_of_all": best["name"], "regret": pick["relative_time"] / best["relative_time"] - 1,
        "regret_by_bucket": {b: pick["p50_ms"][b] / min(c["p50_ms"][b] for c in good) - 1 for b in whole["buckets"]},
        "drop": found["chosen"]["drop"], "plain": plain["name"],
        "time_against_plain": {b: pick["p50_ms"][b] / plain["p50_ms"][b] for b in whole["buckets"]},
        "p50_ms": {name: c["p50_ms"] for name, c in fit.items()}, "front": whole["front"],
    }  # fmt: skip


if __name__ == "__main__":
    main()

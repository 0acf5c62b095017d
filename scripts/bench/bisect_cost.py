#!/usr/bin/env python
"""What finding the first wrong node costs, as a multiple of one `deploytool verify`.

A shipped 6-layer encoder is exported with one layer spoilt, and verified against the unspoilt model, with and without
`--bisect`, in turns. Both are whole commands; task metrics are left out, since they would only make the ratio smaller.
Prints JSON: per target wall and CPU seconds of both (medians), their ratios, the node that was named, and whether it
lies in the spoilt layer.

    python scripts/bench/bisect_cost.py --targets torchscript ort ort-int8 openvino --turns 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploytool.shipped import find

LAYER = 3
SPOIL = f"""

_right = build


def build():
    model = _right()
    with torch.no_grad():
        model.encoder.encoder.layer[{LAYER}].output.dense.weight.mul_(0.8)
    return model
"""


def main() -> None:
    """Export the spoilt model to each target, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", default=["torchscript", "ort", "ort-int8", "openvino"])
    parser.add_argument("--turns", type=int, default=3)
    given = parser.parse_args()
    shipped = find("models", "minilm", ".py")
    assert shipped is not None
    with tempfile.TemporaryDirectory() as work:
        spoilt = Path(work) / "spoilt.py"
        spoilt.write_text(shipped.read_text() + SPOIL)
        rows = [measured(spoilt, target, Path(work) / target, given.turns) for target in given.targets]
    print(json.dumps({"model": "minilm", "layer": LAYER, "turns": given.turns, "targets": rows}, indent=2))


def measured(spoilt: Path, target: str, out: Path, turns: int) -> dict[str, Any]:
    """One target's figures."""
    export = ["export", str(spoilt), "--target", target, "--no-bench", "--no-quality", "-o", str(out), "-q"]
    assert deploytool(*export)[0] == 0, f"{target} must build"
    verify = ["verify", str(out / target), "--model", "minilm", "--no-quality", "--json", "-q"]
    deploytool(*verify)  # the first one prepares the model
    times: dict[str, list[tuple[float, float]]] = {"verify": [], "bisect": []}
    for _ in range(turns):
        for name, command in (("verify", verify), ("bisect", [*verify, "--bisect"])):
            code, said, wall, cpu = deploytool(*command)
            assert code == 1, f"{target}: {name} must find the fault (got exit code {code})"
            times[name].append((wall, cpu))
    found = json.loads(said)["targets"][0]["bisect"]
    middle = {f"{name}_{kind}_s": statistics.median(t[i] for t in got)
              for name, got in times.items() for i, kind in enumerate(("wall", "cpu"))}  # fmt: skip
    row = {"target": target, **{key: round(value, 2) for key, value in middle.items()},
           "wall_ratio": round(middle["bisect_wall_s"] / middle["verify_wall_s"], 2),
           "cpu_ratio": round(middle["bisect_cpu_s"] / middle["verify_cpu_s"], 2),
           "node": found["node"], "module": found["module"], "cause": found["cause"], "replays": found["replays"],
           "right": f"layer.{LAYER}.output" in f"{found['module']} {found['node']}".replace("/", ".")}  # fmt: skip
    print(json.dumps(row), file=sys.stderr)
    return row


def deploytool(*arguments: str) -> tuple[int, str, float, float]:
    """Run the command: its exit code, what it printed, seconds, and CPU seconds of it and all that it waited for."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "deploytool", *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stdout.close()
    return process.returncode, said, time.perf_counter() - started, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()

#!/usr/bin/env python
"""What an export costs: `deploytool export` against `optimum-cli export onnx`, whole processes, in alternation.

Both are measured from start to end of the command: wall seconds, CPU seconds, and the peak of the resident memory of
the whole process tree, summed every 20 ms. Both lower the model, verify it and leave timing out. optimum-onnx 0.1.0
cannot live beside transformers 5, so it gets an environment of its own:

    python scripts/bench/export_cost.py --make-env /tmp/optimum          # once; downloads
    python scripts/bench/export_cost.py --optimum-python /tmp/optimum --model minilm --folder FOLDER --runs 5

MODEL is what deploytool gets, FOLDER the same model as a Hugging Face folder for optimum. For a GGUF file,
`--gguf FILE` writes that folder first, outside the measurement, and both sides get it.

A last export of deploytool's notes what each of its processes imports. `memory` tells how much of the peak processes
that do nothing but import the same hold, and how much the export adds to that, as a multiple of the fp32 weights too.
`--memory-only` takes just this, without optimum.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PEER = ("torch==2.13.0", "transformers==4.57.6", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnx==1.23.2",
        "onnxruntime==1.31.1", "accelerate==1.15.0", "gguf")  # fmt: skip
SAMPLE_SECONDS = 0.02
_PAGE_BYTES = resource.getpagesize()
# In every Python process that finds it: each module that is looked for, with the process that does, in a file.
_NOTE_IMPORTS = """
import os, sys
class Noted:
    file = os.open(os.environ["NOTED_IMPORTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    def find_spec(name, path=None, target=None):
        os.write(Noted.file, f"{os.getpid()} {name}\\n".encode())
sys.meta_path.insert(0, Noted)
"""
_ONLY_IMPORT = """
import contextlib, importlib, sys
for name in sys.stdin.read().split():
    with contextlib.suppress(BaseException):
        importlib.import_module(name)
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")))
"""


@dataclass(frozen=True)
class Cost:
    """One run. `peak_bytes` sums the resident memory of the process and its descendants; pages shared by two of them
    count twice."""

    wall_seconds: float
    cpu_seconds: float
    peak_bytes: int
    output_bytes: int


def measure(command: list[str], output: Path, log: Path) -> Cost:
    """Run a command to its end, with the cache beside its output; raises RuntimeError with its log when it fails."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    peak = _peak(command, _environment(output.parent / "cache"), log)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Cost(wall, cpu, sum(peak.values()), size)


def _peak(command: list[str], environment: dict[str, str], log: Path) -> dict[int, int]:
    """Run it to its end: the resident bytes of each of its processes when they hold the most together."""
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment)
        peak: dict[int, int] = {}
        while process.poll() is None:
            peak = max(peak, _tree_rss(process.pid), key=lambda found: sum(found.values()))
            time.sleep(SAMPLE_SECONDS)
    if process.returncode != 0:
        tail = log.read_text()[-3000:]
        raise RuntimeError(f"{command[0]} must succeed (got exit code {process.returncode}):\n{tail}")
    return peak


def _environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "DEPLOYTOOL_CACHE": str(cache)}


def _tree_rss(pid: int) -> dict[int, int]:
    """Resident bytes of a process and its descendants, from /proc: walking the whole process table would take a tenth
    of a core, and from what is measured."""
    folder = Path(f"/proc/{pid}")
    try:
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (OSError, ValueError, IndexError):
        return {}  # it ended
    found = {pid: pages * _PAGE_BYTES}
    for child in children:
        found |= _tree_rss(int(child))
    return found


def memory(command: list[str], output: Path) -> dict[str, Any]:
    """What the processes of an export hold at their peak, what those hold that only import the same, and the rest."""
    work = output.parent
    (work / "note").mkdir()
    (work / "note" / "sitecustomize.py").write_text(_NOTE_IMPORTS)
    paths = [str(work / "note"), *filter(None, [os.environ.get("PYTHONPATH")])]
    noted = {"PYTHONPATH": os.pathsep.join(paths), "NOTED_IMPORTS": str(work / "imports")}
    peak = _peak(command, _environment(work / "cache") | noted, work / "memory.log")
    lines = [line.split() for line in (work / "imports").read_text().splitlines()]
    parts = []
    for pid, held in peak.items():
        names = "\n".join(dict.fromkeys(name for one, name in lines if int(one) == pid and name != "sitecustomize"))
        done = subprocess.run([sys.executable, "-c", _ONLY_IMPORT], input=names, capture_output=True, text=True,
                              env=_environment(work / "cache"), check=True)  # fmt: skip
        # One that holds less than its imports take has not come to all of them yet.
        parts.append({"peak_bytes": held, "imports_bytes": min(held, int(done.stdout.split()[-1]))})
    sums = {key: sum(part[key] for part in parts) for key in ("peak_bytes", "imports_bytes")}
    added, weights = sums["peak_bytes"] - sums["imports_bytes"], _weight_bytes(output)
    return {**sums, "added_bytes": added, "weight_bytes": weights, "peak_per_weights": sums["peak_bytes"] / weights,
            "added_per_weights": added / weights, "processes": parts}  # fmt: skip


def _weight_bytes(output: Path) -> int:
    """Bytes of the model's weights in fp32, as the cache that lies beside the output has them."""
    kept = next((output.parent / "cache").rglob("prepared.json"))
    return int(json.loads(kept.read_text())["weight_bytes"])


def make_environment(folder: Path) -> None:
    """A virtual environment with optimum-onnx; a few GB are downloaded."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin" / "pip", "install", "--quiet", *PEER], check=True)


def folder_from_gguf(python: Path, gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as a Hugging Face folder in fp32."""
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM, AutoTokenizer; p, f, o = sys.argv[1:]\n"
        "AutoModelForCausalLM.from_pretrained(p, gguf_file=f, dtype=torch.float32).save_pretrained(o)\n"
        "AutoTokenizer.from_pretrained(p, gguf_file=f).save_pretrained(o)"
    )
    subprocess.run([python, "-c", code, gguf.parent, gguf.name, folder], check=True, stdout=subprocess.DEVNULL)


def commands(args: argparse.Namespace, folder: Path, out: Path) -> dict[str, list[str]]:
    """The two command lines; both get the same weights."""
    peer = args.optimum_python / "bin" / "optimum-cli"
    return {
        "deploytool": ours(args, folder, out),
        "optimum": [str(peer), "export", "onnx", "--task", args.task, "--model", str(folder), str(out)],
    }


def ours(args: argparse.Namespace, folder: Path, out: Path) -> list[str]:
    """deploytool's command line."""
    options = [] if args.quality else ["--no-quality"]
    return [sys.executable, "-m", "deploytool", "export", str(args.model or folder), "--target", args.target,
            "-o", str(out), "--no-bench", "--json", *options]  # fmt: skip


def compare(args: argparse.Namespace, folder: Path, work: Path) -> dict[str, Any]:
    """Alternate the two commands `runs` times, in turn each first; the first pair only warms the file cache.

    Every pair starts with an empty cache; deploytool then runs once more with what it kept.
    """
    costs: dict[str, list[Cost]] = {"deploytool": [], "optimum": []}
    again: list[Cost] = []
    for run in range(args.runs + 1):
        for name in sorted(costs, reverse=run % 2 == 1):
            with tempfile.TemporaryDirectory(dir=work) as out:
                target = Path(out) / "artifact"
                command = commands(args, folder, target)[name]
                cost = measure(command, target, work / f"{name}.log")
                if name == "deploytool" and run:
                    again.append(measure([*command, "--overwrite"], target, work / "again.log"))
            print(f"run {run} {name}: {asdict(cost)}", file=sys.stderr)
            if run:
                costs[name].append(cost)
    firsts = [cost.wall_seconds for cost in costs["deploytool"]]
    shares = [second.wall_seconds / first for second, first in zip(again, firsts, strict=True)]
    return {**summary(costs), "unchanged_again": {"runs": [asdict(cost) for cost in again],
                                                  "wall_share_of_first": statistics.median(shares)}}  # fmt: skip


def summary(costs: dict[str, list[Cost]]) -> dict[str, Any]:
    """Per tool all runs and their medians; per measure the median of the pairs' ratios, deploytool over optimum."""
    measures = list(Cost.__dataclass_fields__)
    medians = {
        name: {m: statistics.median(getattr(cost, m) for cost in runs) for m in measures}
        for name, runs in costs.items()
    }
    pairs = list(zip(costs["deploytool"], costs["optimum"], strict=True))
    ratios = {m: statistics.median(getattr(ours, m) / getattr(theirs, m) for ours, theirs in pairs) for m in measures}
    runs = {name: [asdict(cost) for cost in tool] for name, tool in costs.items()}
    return {"median": medians, "ratio": ratios, "runs": runs}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make-env", type=Path, metavar="FOLDER", help="make optimum's environment there and stop")
    parser.add_argument("--optimum-python", type=Path, metavar="FOLDER", help="optimum's environment")
    parser.add_argument("--model", help="what deploytool exports (default: the folder)")
    parser.add_argument("--folder", type=Path, help="the Hugging Face folder that optimum exports")
    parser.add_argument("--gguf", type=Path, help="make the folder from this file")
    parser.add_argument("--task", default="feature-extraction", help="optimum's task (default: %(default)s)")
    parser.add_argument("--target", default="ort", help="deploytool's target (default: %(default)s)")
    parser.add_argument("--quality", action="store_true", help="let deploytool check the task metric and decoding too")
    parser.add_argument("--memory-only", action="store_true", help="only what the peak of the memory is made of")
    parser.add_argument("--runs", type=int, default=3, help="measured pairs, after one that warms up")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()), help="where outputs may be written")
    args = parser.parse_args()
    if args.make_env:
        make_environment(args.make_env)
        return 0
    if not (args.optimum_python or args.memory_only) or not (args.folder or args.gguf):
        parser.error("--optimum-python or --memory-only, and one of --folder and --gguf, must be given")
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        folder = args.folder or Path(work) / "model"
        if args.gguf:
            python = args.optimum_python / "bin" / "python" if args.optimum_python else Path(sys.executable)
            folder_from_gguf(python, args.gguf, folder)
        result = {} if args.memory_only else compare(args, folder, Path(work))
        with tempfile.TemporaryDirectory(dir=work) as out:
            target = Path(out) / "artifact"
            result["memory"] = memory(ours(args, folder, target), target)
    machine = {"processor": platform.processor() or platform.machine(), "logical_cpus": os.cpu_count(),
               "load_average_1min": os.getloadavg()[0]}  # fmt: skip
    report = {"schema_version": "1.0", "model": str(args.model or folder), "machine": machine, **result}
    print(json.dumps(report, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())

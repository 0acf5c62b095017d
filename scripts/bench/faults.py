#!/usr/bin/env python
"""How many planted faults parity catches, how often bisection names the right node, and how often clean exports fail.

    python scripts/bench/faults.py --faults              # every planted fault
    python scripts/bench/faults.py --drawn 100           # faults drawn from seeds, in models drawn from seeds
    python scripts/bench/faults.py --clean 100           # clean exports of models drawn from seeds, two targets each

Prints JSON. Faults are planted in the files of artifacts that were built as ever; what is reported is what
`deploytool verify --bisect` computes: parity, limits from the reference's own noise, and the first wrong node.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from drawn import drawn_fault
from planted import FAULTS, Fault

from deploytool.artifact import Artifact
from deploytool.backends.base import open_artifact
from deploytool.backends.build import build_job
from deploytool.cases import Case, case_files
from deploytool.errors import DeployError
from deploytool.lower.noise import noise_job
from deploytool.lower.prepare import prepare_job
from deploytool.source import ModelRef
from deploytool.target import load_target
from deploytool.verify.bisect import bisect_job
from deploytool.verify.derived import arithmetic, derived_limits
from deploytool.verify.judge import judge_parity
from deploytool.verify.nodes import judge_nodes, nodes_job
from deploytool.verify.parity import parity_job

VARIED = Path(__file__).with_name("varied.py")
TARGETS = ("torchscript", "ort-int8", "openvino", "fbgemm", "openvino-int8")


@dataclass
class Model:
    """A prepared model with its artifacts, made when first asked for."""

    kind: str
    seed: int
    work: Path

    def __post_init__(self) -> None:
        self.work.mkdir(parents=True)
        text = VARIED.read_text().replace('KIND = "transformer"', f'KIND = "{self.kind}"')
        file = self.work / f"{self.kind}_{self.seed}.py"
        file.write_text(text.replace("SEED = 0", f"SEED = {self.seed}", 1))
        self.ref = asdict(ModelRef("python", file.stem, str(file)))
        self.prepared = self.work / "prepared"
        self.prepared.mkdir()
        try:
            prepare_job(self.ref, str(self.prepared), "torchscript", 0)
        except DeployError:
            shutil.rmtree(self.prepared)
            self.prepared.mkdir()
            prepare_job(self.ref, str(self.prepared), "dynamo", 0)
        self.noise = noise_job(self.ref, str(self.prepared))

    def build(self, target: str) -> Path:
        """The artifact's folder."""
        folder = self.work / target
        if not folder.is_dir():
            folder.mkdir()
            profile = load_target(target).to_json()
            build_job(profile, str(self.prepared), self.ref, "-", str(folder), 0)
        return folder

    def verify(self, folder: Path, target: str) -> tuple[list[str], dict[str, Any]]:
        """What is wrong, and the figures; an engine that does not run is wrong too.

        "by_outputs" is what the outputs alone show, "nodes" what each node by itself does.
        """
        profile = load_target(target)
        try:
            parity = parity_job(str(folder), str(self.prepared / "cases"))
        except DeployError as error:
            return [str(error)], {}
        parity["derived"] = derived_limits(self.noise, arithmetic(Artifact.load(folder, check=False)), profile.parity)
        nodes = nodes_job(str(folder), str(self.prepared), self.ref)
        outputs = judge_parity(parity, profile.parity)
        return outputs + judge_nodes(nodes), {**parity, "nodes": nodes, "by_outputs": outputs}


def planted(fault: Fault, model: Model, work: Path) -> dict[str, Any]:
    """One fault: caught or not, the node that was named and the one that was meant."""
    folder = work / "faulty"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(model.build(fault.target), folder)
    graph = onnx.load(folder / "model.onnx")
    meant = fault.plant(graph, onnx.load(model.prepared / "onnx" / "model.onnx"))
    onnx.save(graph, folder / "model.onnx")
    Artifact.load(folder, check=False).save()
    if not _moves(model.build(fault.target), folder, model.prepared / "cases"):
        return {"fault": fault.name, "kind": fault.kind, "without_effect": True}
    started = time.perf_counter()
    wrong, figures = model.verify(folder, fault.target)
    verified = time.perf_counter()
    row: dict[str, Any] = {"fault": fault.name, "kind": fault.kind, "model": model.kind, "target": fault.target,
                           "mild": fault.mild, "caught": bool(wrong),
                           "by_outputs": bool(figures.get("by_outputs", wrong)), "said": (wrong or [""])[0][:160],
                           "meant": meant}  # fmt: skip
    found = bisect_job(str(folder), str(model.prepared), model.ref)
    return {**row, "named": found["node"], "right": found["node"] in meant, "found": found["found"],
            "cause": found["cause"], "sentence": found["sentence"][:160],
            "seconds": [verified - started, time.perf_counter() - verified]}  # fmt: skip


def _moves(clean: Path, faulty: Path, cases: Path) -> bool:
    """Whether a fault changes a single bit of any output of any case: one that does not is none that can be told."""
    files = case_files(cases)
    try:
        with open_artifact(Artifact.load(clean)) as right, open_artifact(Artifact.load(faulty)) as wrong:
            for path in files:
                inputs = Case.load(path).inputs
                got = wrong.run(inputs)
                if any(not np.array_equal(array, got[name]) for name, array in right.run(inputs).items()):
                    return True
    except DeployError:
        return True
    return False


def run_drawn(work: Path, count: int, first: int) -> list[dict[str, Any]]:
    """`count` faults from seeds: those that do not fit the model that they are drawn for make room for the next."""
    models: dict[tuple[str, int], Model] = {}
    rows: list[dict[str, Any]] = []
    seed = first
    while sum("caught" in row for row in rows) < count:
        fault = drawn_fault(seed)
        seed += 1
        key = (fault.model, fault.seed)
        if key not in models:
            models[key] = Model(*key, work / f"{fault.model}-{fault.seed}")
        row = _guarded(lambda fault=fault, key=key: planted(fault, models[key], work), fault=fault.name)
        if "caught" in row or "code" in row:
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def run_faults(work: Path, only: str) -> list[dict[str, Any]]:
    models: dict[tuple[str, int], Model] = {}
    rows = []
    for fault in FAULTS:
        if only and only not in fault.name:
            continue
        key = (fault.model, fault.seed)
        if key not in models:
            models[key] = Model(*key, work / f"{fault.model}-{fault.seed}")
        rows.append(_guarded(lambda fault=fault, key=key: planted(fault, models[key], work), fault=fault.name))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def run_clean(work: Path, count: int, first: int, targets: Sequence[str]) -> list[dict[str, Any]]:
    """`count` exports: each model to ort and to one of the targets, in turn."""
    from varied import KINDS

    rows = []
    for index in range(first, first + (count + 1) // 2):
        kind, folder = KINDS[index % len(KINDS)], work / str(index)
        model = Model(kind, index, folder)
        for target in ("ort", targets[index // len(KINDS) % len(targets)]):
            rows.append(_guarded(lambda m=model, t=target: _clean(m, t), model=f"{kind} {index}", target=target))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        shutil.rmtree(folder)
    return rows


def _clean(model: Model, target: str) -> dict[str, Any]:
    wrong, parity = model.verify(model.build(target), target)
    shares = [figures["relative_error"] / parity["derived"][name]["relative_error_max"]
              for name, figures in parity.get("outputs", {}).items()]  # fmt: skip
    nodes = parity["nodes"]
    return {"model": f"{model.kind} {model.seed}", "target": target, "alarm": wrong, "share_of_limit": max(shares),
            **{key: nodes[key] for key in ("tensors", "uncertain", "refused", "unjudged")}}  # fmt: skip


def _guarded(run: Callable[[], dict[str, Any]], **about: Any) -> dict[str, Any]:
    try:
        return run()
    except DeployError as error:
        return {**about, "refused": error.message[:300], "code": error.code}
    except (IndexError, StopIteration, AssertionError, ValueError) as error:
        return {**about, "refused": f"cannot be planted here: {error!r}"[:300]}


def summary(faults: list[dict[str, Any]], clean: list[dict[str, Any]]) -> dict[str, Any]:
    """Shares, and everything that is not as it should be."""
    taken_up = [row for row in faults if "caught" in row]
    done, mild = ([row for row in taken_up if row["mild"] == wanted] for wanted in (False, True))
    taken = [row for row in clean if "alarm" in row]
    return {
        "faults": len(done),
        "kinds": len({row["kind"] for row in done}),
        "caught": sum(row["caught"] for row in done),
        "caught_by_outputs_alone": sum(row["by_outputs"] for row in done),
        "named_right": sum(row["right"] for row in done),
        "mild": len(mild),
        "mild_caught": sum(row["caught"] for row in mild),
        "mild_named_right": sum(row["right"] for row in mild),
        "causes": dict(Counter(f"{row['kind']}: {row['cause']}" for row in done)),
        "missed": [row for row in done if not (row["caught"] and row["right"])],
        "clean": len(taken),
        "alarms": [row for row in taken if row["alarm"]],
        "largest_share_of_limit": max((row["share_of_limit"] for row in taken), default=None),
        "refused": [row for row in (*faults, *clean) if "refused" in row],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", action="store_true", help="plant every fault")
    parser.add_argument("--only", default="", help="with --faults: those whose name holds this word")
    parser.add_argument("--clean", type=int, default=0, metavar="N", help="verify N clean exports")
    parser.add_argument("--drawn", type=int, default=0, metavar="N", help="plant N faults drawn from seeds")
    parser.add_argument("--first", type=int, default=0, help="with --clean and --drawn: the first seed")
    parser.add_argument("--targets", nargs="+", default=TARGETS, help="with --clean: beside ort")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    # NNCF shows its progress on stdout, where the figures go.
    with tempfile.TemporaryDirectory(prefix="deploytool-faults-") as folder, contextlib.redirect_stdout(sys.stderr):
        faults = run_faults(Path(folder), given.only) if given.faults else []
        if given.drawn:
            faults += run_drawn(Path(folder) / "drawn", given.drawn, given.first)
        clean = run_clean(Path(folder) / "clean", given.clean, given.first, given.targets) if given.clean else []
    print(json.dumps(summary(faults, clean), indent=2))


if __name__ == "__main__":
    main()

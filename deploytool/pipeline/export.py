"""Export: the order of the stages. prepare -> build -> verify -> bench, one target after the other.

Everything heavy runs in worker processes; this module only decides what comes next and collects what came out.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.artifact import GOLDEN, MANIFEST, REPORT, Artifact
from deploytool.backends.base import Probe, find_backend, load_checked_target
from deploytool.bench.environment import environment
from deploytool.bundle.contents import FAILED
from deploytool.cache import Prepared, prepare
from deploytool.cases import case_files, read_cases, sizes_of, unrecorded
from deploytool.decoding import decodes
from deploytool.errors import BackendFailed, DeployError, InputRefused, UsageProblem
from deploytool.load.resolve import resolve
from deploytool.pipeline.ahead import Ahead
from deploytool.pipeline.best import no_better, plain_instead
from deploytool.pipeline.findings import findings_of
from deploytool.pipeline.kept import parity_of
from deploytool.pipeline.needs import NOTHING_NEEDED, Needs, needs, refuse_impossible, weights_of
from deploytool.pipeline.reference import Reference
from deploytool.pipeline.speed import speed_of
from deploytool.source import ModelRef
from deploytool.storage import refuse_existing, settle, sha256_file, work_folder, write_json
from deploytool.target import Target, load_target, target_names
from deploytool.verify.judge import judge_parity, judge_quality

SCHEMA_VERSION = "1.0"
ALL = "all"
_LARGE_BYTES = 300_000_000  # of weights: beside these, a process that only waits is small
# What a result holds where there is nothing to tell: every result has every key.
_NOTHING: dict[str, Any] = {
    "target": None, "status": None, "reason": None, "artifact": None, "artifact_digest": None, "size_bytes": None,
    "precision": None, "executed": None, "ran": None, "measured": None, "parity": None, "compression": None,
    "quality": {}, "generation": None, "speed": None, "memory": None, "findings": [], "seconds": {}, "kept": None,
}  # fmt: skip
Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to export. `bench_seconds` is the time budget of one target's timing; 0 leaves timing out.

    `samples` is an .npz file or a folder of such, for a model that brings none. With `keep_best`, an artifact below
    fp32 that is no better than its plain one gives way to it.
    """

    out: Path
    overwrite: bool = False
    bench_seconds: float = 10.0
    quality: bool = True
    exporter: str = "auto"
    seed: int = 0
    cache: bool = True
    limits: worker.Limits = worker.NO_LIMITS
    samples: Path | None = None
    keep_best: bool = False


@dataclass(frozen=True)
class Plan:
    """What will be done: printed before work starts, and all that a dry run gives."""

    model: ModelRef
    targets: tuple[Target, ...]
    unavailable: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # name -> (reason, fix)
    needs: Needs = NOTHING_NEEDED

    def to_json(self, options: Options) -> dict[str, Any]:
        return {
            "model": asdict(self.model),
            "targets": [t.name for t in self.targets],
            "unavailable": {name: reason for name, (reason, _) in self.unavailable.items()},
            "output": str(options.out),
            "needs_at_least_bytes": self.needs.to_json(),
            "bench_seconds": options.bench_seconds,
            "quality": options.quality,
            "seed": options.seed,
        }


def make_plan(model: str, targets: Sequence[str], options: Options) -> Plan:
    """Resolve names, check profiles and this machine; raises before any work is done."""
    ref = resolve(model, options.samples)
    refuse_existing(options.out, options.overwrite)
    names = list(dict.fromkeys(n for t in targets for n in (target_names() if t == ALL else [t])))
    profiles = [load_checked_target(name) for name in names]
    plains = [p.plain for p in profiles if p.plain and options.keep_best]
    for written in dict.fromkeys([*(p.name for p in profiles), *plains]):
        for place in (options.out / written, failed_folder(options.out / written)):
            refuse_existing(place, options.overwrite, MANIFEST)  # what is not ours is not replaced, whatever was asked
    if options.keep_best and not options.bench_seconds:
        raise UsageProblem("DT201", "the better of two can be kept only when they are timed (got no time for it)",
                           fix="leave --no-bench out")  # fmt: skip
    _refuse_same_name(profiles)
    probes = {p.name: _probe(p, ref) for p in profiles}
    able = tuple(p for p in profiles if probes[p.name].available)
    needed = needs(weights_of(ref), able, any(find_backend(p.backend).accepts == "onnx" for p in able))
    refuse_impossible(needed, options.out, options.limits)
    return Plan(ref, able, {n: (p.reason, p.fix) for n, p in probes.items() if not p.available}, needed)


def _probe(profile: Target, ref: ModelRef) -> Probe:
    """What the backend says of this machine, and whether it takes this kind of model."""
    backend = find_backend(profile.backend)
    if backend.accepts == "source" and backend.name != "eager" and not ref.has_module:
        return Probe(False, False, "it is built from a PyTorch module, and an ONNX file has only its graph",
                     "name the model as a Python model file or a Hugging Face folder")  # fmt: skip
    return backend.probe(profile)


def _refuse_same_name(profiles: Sequence[Target]) -> None:
    """Each artifact lies in the folder that its target names, on case-insensitive file systems too."""
    names = [p.name.lower() for p in profiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageProblem("DT201", f"every target must have a name of its own (got {', '.join(twice)} twice)",
                           fix="change `name` in one of the profiles")  # fmt: skip


def export(plan: Plan, options: Options, say: Say, ahead: Ahead | None = None) -> dict[str, Any]:
    """Carry out a plan; returns the report that `export --json` prints. Processes may have been started `ahead`.

    A target that fails does not stop the others; its "status" and "reason" say so, and what was built is kept as
    `NAME.failed` when its figures are the reason. Raises only when the model itself cannot be taken.
    """
    if ahead is None:
        with Ahead(options.limits) as ahead:
            return export(plan, options, say, ahead)
    results = [_unavailable(name, reason) for name, (reason, _) in plan.unavailable.items()]
    with _output(options.out), work_folder(options.out) as work:
        if plan.targets:
            say(f"preparing {plan.model.name}")
            prepared, targets, failed = _prepare(plan, options, ahead, say)
            results += failed
            graph = prepared.folder / "onnx"
            size = sum(path.stat().st_size for path in graph.iterdir()) if graph.is_dir() else 0
            size = max(size, prepared.info["weight_bytes"])  # of a model file neither is known before
            refuse_impossible(needs(size, targets, False), options.out, options.limits)
            reference = Reference(plan.model, prepared, work, options.limits, options.seed, ahead)
            if reference.is_compressed and options.bench_seconds and any(t.backend != "eager" for t in targets):
                reference.uncompressed = _uncompressed(reference.original, graph.is_dir(), work, options,
                                                       ahead, say)  # fmt: skip
            made: dict[str, dict[str, Any]] = {}  # plain ones that were built out of turn, each once
            for target in targets:
                if target.name in made:
                    results.append(made[target.name])
                    continue
                result = _one(target, reference, options, say, [*results, *made.values()])
                why = no_better(target, result) if options.keep_best else None
                if why and target.plain:
                    say(f"{target.name}: {why}")
                    known = {r["target"]: r for r in results} | made
                    if target.plain not in known:
                        plain = next((t for t in targets if t.name == target.plain), None)
                        made[target.plain] = _one(plain or load_checked_target(target.plain), reference, options, say,
                                                  results)  # fmt: skip
                    result = plain_instead(target, result, why, (known | made)[target.plain])
                results.append(result)
    report = {"schema_version": SCHEMA_VERSION, "model": plan.model.name, "environment": environment(),
              "targets": results}  # fmt: skip
    if plan.targets:  # else nothing was tried, and the next call must not find its output taken
        write_json(options.out / REPORT, report)
    _tell_of_others(options.out, [str(result["target"]) for result in results], say)
    return report


def _uncompressed(ref: ModelRef, graph: bool, work: Path, options: Options, ahead: Ahead, say: Say
                  ) -> Reference | DeployError:  # fmt: skip
    """The reference of a compressed model's original, whose artifacts are timed beside; or why there is none."""
    say(f"preparing {ref.name}, which the compressed model is timed against")
    try:
        prepared = prepared_and_checked(ref, options, graph, say, ahead)
    except DeployError as error:
        return error
    return Reference(ref, prepared, work, options.limits, options.seed, ahead)


def _tell_of_others(out: Path, written: Sequence[str], say: Say) -> None:
    """Artifacts of earlier exports stay, since they may be wanted; `package` would take them too."""
    others = sorted({p.parent.name.removesuffix(FAILED) for p in out.glob(f"[!.]*/{MANIFEST}")} - set(written))
    if others:
        say(f"of an earlier export, and not in this report: {', '.join(others)} (in {out})")


@contextmanager
def _output(folder: Path) -> Iterator[None]:
    """Makes the output folder, which goes again when nothing came to lie in it."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with suppress(OSError):  # it is not empty, as it should be
            folder.rmdir()


def _prepare(
    plan: Plan, options: Options, ahead: Ahead, say: Say
) -> tuple[Prepared, Sequence[Target], list[dict[str, Any]]]:
    """The prepared model, the targets that it can be built for, and results of those that it cannot.

    A model that has no ONNX graph still goes to the targets that take the module itself.
    """
    if plan.needs.cache > _LARGE_BYTES:
        ahead.start(engine=True)
    own = [target for target in plan.targets if find_backend(target.backend).accepts == "source"]
    try:
        return prepared_and_checked(plan.model, options, len(own) < len(plan.targets), say, ahead), plan.targets, []
    except InputRefused as error:
        if error.code != "DT305" or not own:
            raise
        say(str(error))
        failed = [_failed(target, error) for target in plan.targets if target not in own]
        return prepared_and_checked(plan.model, options, False, say), own, failed


def prepared_and_checked(
    ref: ModelRef, options: Options, needs_graph: bool, say: Say = lambda line: None, ahead: Ahead | None = None
) -> Prepared:
    """The prepared model, its ONNX graph shown to be right at every case's shape; a decoder's at all but the largest.

    The fast exporter traces; where that bakes a shape in, the graph is lowered again by the other exporter. Where no
    target takes the graph, none is made.
    """
    if not needs_graph:
        return prepare(ref, exporter=None, seed=options.seed, limits=options.limits, use=options.cache)
    if ahead is None:
        with Ahead(options.limits) as own:
            return prepared_and_checked(ref, options, needs_graph, say, own)
    exporters = ["torchscript", "dynamo"] if options.exporter == "auto" and ref.has_module else [options.exporter]
    wrong: list[str] = []
    why = ""
    fix = ("look for sizes and values that forward() turns into Python numbers; or choose targets that take the module "
           "itself (torchscript)")  # fmt: skip
    for exporter in exporters:
        try:
            prepared, found = _lowered(ref, exporter, options, ahead)
        except InputRefused as error:
            if error.code != "DT305" or len(exporters) == 1:
                raise
            wrong += error.detail
            fix, why = error.fix or fix, f" (got {error.detail[-1]})" if error.detail else ""
            continue
        if not found:
            notes = (f"the graph was made by {exporter}, since the other was wrong: {wrong[0]}",) if wrong else ()
            for note in notes:
                say(note)
            return replace(prepared, notes=notes)
        wrong += [f"{exporter}: {sentence}" for sentence in found[:5]]
    raise InputRefused("DT305", f"the ONNX graph must compute what the model does at every shape of the samples{why}",
                       detail=wrong[:10], fix=fix)  # fmt: skip


def _lowered(ref: ModelRef, exporter: str, options: Options, ahead: Ahead) -> tuple[Prepared, list[str]]:
    """A model lowered by one exporter, and what is wrong with its graph."""
    prepared = prepare(ref, exporter=exporter, seed=options.seed, limits=options.limits, use=options.cache,
                       soon=ahead.start, run=ahead.run)  # fmt: skip
    graph = Artifact.load(prepared.folder / "onnx", check=False)
    try:
        with ExitStack() as stack:
            figures, _ = parity_of(prepared, graph, lambda: stack.enter_context(ahead.lend(f"checking {ref.name}")),
                                   ships=not decodes(graph.signature))  # fmt: skip
    except BackendFailed as error:
        if error.code != "DT504":
            raise
        return prepared, [error.message]  # a size that was fixed often shows as an operator that refuses
    limits = load_target("ort").parity
    return prepared, judge_parity(figures, limits.beside_grids() if "input_grids" in graph.settings else limits)


def _unavailable(name: str, reason: str) -> dict[str, Any]:
    return {**_NOTHING, "target": name, "status": "unavailable", "reason": reason}


def _one(
    target: Target, reference: Reference, options: Options, say: Say, done: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Build, verify and time one target; a DeployError becomes its status."""
    final = options.out / target.name
    try:
        with tempfile.TemporaryDirectory(dir=reference.work) as temporary:
            folder = Path(temporary) / target.name
            folder.mkdir()
            result = _stages(target, folder, reference, options, say, done)
            place, other = final, failed_folder(final)
            if result["status"] != "ok":
                place, other = other, place
            about = {"schema_version": SCHEMA_VERSION, "model": reference.ref.name, "environment": environment()}
            write_json(folder / REPORT, {**about, **result, "artifact": "."})  # paths of this machine do not ship
            result["artifact"] = str(place)
            settle(folder, place)
            shutil.rmtree(other, ignore_errors=True)
    except DeployError as error:
        say(str(error))
        for stale in (final, failed_folder(final)):  # of an earlier run: it must not stand for this one
            shutil.rmtree(stale, ignore_errors=True)
        return _failed(target, error)
    return result


def _failed(target: Target, error: DeployError) -> dict[str, Any]:
    return {**_NOTHING, "target": target.name, "status": "failed", "reason": error.message, "error": error.to_json()}


def failed_folder(final: Path) -> Path:
    """Where an artifact goes whose figures are outside its profile's limits."""
    return final.with_name(final.name + FAILED)


def _stages(
    target: Target, folder: Path, reference: Reference, options: Options, say: Say, done: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    clock = _Clock()
    with reference.engine(target) as engine:
        say(f"{target.name}: building")
        artifact = reference.build(target, folder, engine)
        target = Target.model_validate(dict(artifact.target), strict=False)  # with limits eased for learned grids
        clock.lap("build")
        say(f"{target.name}: verifying")
        parity = reference.parity(artifact, engine)
    ran = parity.pop("ran", None)
    artifact = replace(artifact, settings={**artifact.settings, "ran": ran}).save(known=artifact.files)
    compression = reference.compression(artifact)
    wrong = judge_parity(parity, target.parity)
    quality, generation = reference.quality_of(artifact, options.quality)
    wrong += judge_quality(quality, generation, target.parity)
    clock.lap("verify")
    findings = [*findings_of(target, artifact, reference.prepared), *_of_recorded(artifact, parity)]
    speed = memory = None
    if options.bench_seconds > 0 and artifact.executes:
        say(f"{target.name}: timing")
        speed, memory, said = speed_of(target, artifact, reference, done, limits=options.limits,
                                       budget_seconds=options.bench_seconds, seed=options.seed)  # fmt: skip
        findings += said
    clock.lap("bench")
    return {
        **_NOTHING,
        "target": target.name,
        "status": "failed" if wrong else "ok",
        "reason": "; ".join(wrong) or None,
        "artifact": None,
        "artifact_digest": sha256_file(folder / "artifact.json"),
        "size_bytes": artifact.size_bytes,
        "precision": artifact.precision,
        "executed": artifact.executes,
        "ran": ran,
        "measured": artifact.settings.get("measured"),
        "parity": {"passed": not judge_parity(parity, target.parity), "shapes": reference.prepared.info["shapes"],
                   **parity},
        "compression": compression,
        "quality": quality,
        "generation": generation,
        "speed": speed,
        "memory": memory,
        "findings": findings,
        "seconds": {"lower": reference.prepared.seconds, "lower_cached": reference.prepared.cached, **clock.laps},
    }  # fmt: skip


def _of_recorded(artifact: Artifact, parity: Mapping[str, Any]) -> list[str]:
    """That the largest sample is too large to be recorded: the gate and the self-test will not see it."""
    recorded = sizes_of(artifact.signature, read_cases(artifact.folder / GOLDEN))
    smaller = any(max(recorded[dim]) < max(sizes) for dim, sizes in parity["sizes"].items())
    said = unrecorded(recorded, len(case_files(artifact.folder / GOLDEN)), parity) if smaller else None
    return [f"the largest sample is too large to be replayed by the gate and the self-test: {said}"] if said else []


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now

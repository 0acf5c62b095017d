"""Finished artifacts looked at again: verify, bench and the release gate on folders and bundles."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact
from deploytool.backends.base import find_backend
from deploytool.backends.cut import CUTTERS, without_graph
from deploytool.bench.compare import compare
from deploytool.bench.decoding import measure_decoding
from deploytool.bench.sizes import resized_case
from deploytool.bundle.contents import artifact_folders, opened
from deploytool.cases import Case, case_files, read_cases, unrecorded
from deploytool.decoding import decodes
from deploytool.errors import BackendFailed, DeployError, InputRefused
from deploytool.gate.check import check
from deploytool.gate.evidence import read_report
from deploytool.gate.limits import GateLimits
from deploytool.load.resolve import resolve
from deploytool.pipeline.export import SCHEMA_VERSION, Options, Say, prepared_and_checked
from deploytool.pipeline.reference import Reference
from deploytool.results import Verdict
from deploytool.signature import Outputs
from deploytool.source import ModelRef
from deploytool.target import Target
from deploytool.verify.derived import arithmetic, derived_limits
from deploytool.verify.judge import judge_parity, judge_quality
from deploytool.verify.nodes import judge_nodes, not_judged, unjudged_said
from deploytool.verify.sizes import unseen


def verify_again(
    path: Path, model: str | None, options: Options, say: Say, *, find_node: bool = False, nodes: bool = True
) -> dict[str, Any]:
    """Parity, the nodes by themselves, and the task metric, of every artifact at `path` against its model.

    The model is `model`, else the one that the artifact names. Where neither can be read, the reference outputs
    that were recorded with the artifact are compared, and the finding says so. With `find_node`, artifacts that fail
    are searched for the first wrong node, which needs the model. Without `nodes` outputs alone are judged.

    Of several artifacts each is judged, also where others are damaged or crash: such a one has the "error" beside its
    reason. The error of a single one is raised.
    """
    how = _How(model, options, say, find_node, nodes)
    places = artifact_folders(path)
    with tempfile.TemporaryDirectory(prefix="deploytool-") as work:
        references = _References(options, Path(work))
        results = [result for place in places or [path]
                   for result in _verify_place(place, how, references, alone=len(places) < 2)]  # fmt: skip
    for result in results:
        if not Path(result["artifact"]).is_relative_to(path):  # a tar's lay in a folder that is gone by now
            result["artifact"] = str(path)
    return {"schema_version": SCHEMA_VERSION, "path": str(path), "targets": results}


@dataclass(frozen=True)
class _How:
    """What `verify_again` was asked for."""

    model: str | None
    options: Options
    say: Say
    find_node: bool
    nodes: bool


@dataclass
class _References:
    """One reference per model, made when first needed, with and without a graph."""

    options: Options
    work: Path
    made: dict[tuple[ModelRef, bool], Reference] = field(default_factory=dict)

    def of(self, ref: ModelRef, graph: bool) -> Reference:
        if (ref, graph) not in self.made:
            prepared = prepared_and_checked(ref, self.options, graph)
            folder = Path(tempfile.mkdtemp(dir=self.work))
            self.made[ref, graph] = Reference(ref, prepared, folder, self.options.limits, self.options.seed)
        return self.made[ref, graph]


def _verify_place(place: Path, how: _How, references: _References, *, alone: bool) -> list[dict[str, Any]]:
    """The results of an artifact, or of a bundle's artifacts."""
    results = []
    try:
        with opened(place) as artifacts:
            for name, artifact in artifacts.items():
                try:
                    results.append(_verify_one(name, artifact, how, references))
                except DeployError as error:
                    if alone and len(artifacts) == 1:
                        raise
                    results.append(_failed(name, artifact.folder, error, how.say))
    except DeployError as error:
        if alone:
            raise
        results.append(_failed(place.name, place, error, how.say))
    return results


def _failed(name: str, folder: Path, error: DeployError, say: Say) -> dict[str, Any]:
    say(str(error))
    nothing = dict.fromkeys(("size_bytes", "precision", "executed", "parity", "generation", "speed", "memory"))
    return {"target": name, "status": "failed", "reason": error.message, "artifact": str(folder), **nothing,
            "quality": {}, "findings": [], "error": error.to_json()}  # fmt: skip


def _verify_one(name: str, artifact: Artifact, how: _How, references: _References) -> dict[str, Any]:
    artifact.check()
    how.say(f"{name}: verifying")
    ref = _model_of(artifact, how.model, how.options.samples)
    if how.find_node:
        _refuse_search(name, artifact, ref)
    if ref is None:
        return _verify_golden(name, artifact, how.options)
    reference = references.of(ref, _from_graph(artifact))
    result = _verify_with(name, artifact, reference, how)
    if how.find_node:
        how.say(f"{name}: searching for the first wrong node")
        result["bisect"] = _search(artifact, reference, how.options, failed=result["status"] == "failed")
    return result


def _nodes(artifact: Artifact, reference: Reference, options: Options) -> dict[str, Any]:
    """What `nodes_job` finds; an artifact whose graph cannot be cut here has its outputs judged alone."""
    try:
        found: dict[str, Any] = worker.run(
            f"judging the nodes of {artifact.target['name']}", "deploytool.verify.nodes:nodes_job", options.limits,
            artifact=str(artifact.folder), prepared=str(reference.prepared.folder), ref=asdict(reference.ref),
        )  # fmt: skip
    except BackendFailed as error:
        broken = worker.run(f"reading the nodes of {artifact.target['name']}", "deploytool.verify.nodes:promises_job",
                            options.limits, artifact=str(artifact.folder))  # fmt: skip
        return {**not_judged(error.message), "wrong": broken}
    return found


def _refuse_search(name: str, artifact: Artifact, ref: ModelRef | None) -> None:
    """Before any work: a search needs a graph, and the model to compare it with."""
    if artifact.backend not in CUTTERS:
        why = f"whose backend {artifact.backend!r} {without_graph(artifact.backend)}"
        raise InputRefused("DT313", f"only an artifact with a graph can be bisected (got {name}, {why})",
                           fix="choose another target")  # fmt: skip
    if ref is None:
        raise InputRefused("DT301", f"the model must be here to find where {name} parts from it (it is not)",
                           fix="name it with --model")  # fmt: skip


def _search(artifact: Artifact, reference: Reference, options: Options, *, failed: bool) -> dict[str, Any]:
    """What `verify --bisect` finds; nothing is searched where nothing is wrong."""
    if not failed:
        return {"found": "nothing", "sentence": "parity passed: there is no wrong node to find"}
    found: dict[str, Any] = worker.run(
        f"bisecting {artifact.target['name']}", "deploytool.verify.bisect:bisect_job", options.limits,
        artifact=str(artifact.folder), prepared=str(reference.prepared.folder), ref=asdict(reference.ref),
    )  # fmt: skip
    return found


def _model_of(artifact: Artifact, model: str | None = None, samples: Path | None = None) -> ModelRef | None:
    if model is not None:
        return resolve(model, samples)
    if "ref" not in artifact.model:  # a bundle does not say where its model lay
        return None
    try:
        named = ModelRef(**artifact.model["ref"])
    except (KeyError, TypeError) as error:
        raise InputRefused("DT309", f"the manifest of {artifact.folder} must name its model (got {error!r})",
                           fix="name it with --model, or export it again") from error  # fmt: skip
    remote = named.kind == "huggingface" and not Path(named.path).is_absolute()
    return named if remote or Path(named.path).exists() else None


def _from_graph(artifact: Artifact) -> bool:
    """Whether it was built from the ONNX graph: where not, the model need not have one."""
    return find_backend(artifact.backend).accepts == "onnx"


def _limits(artifact: Artifact) -> Target:
    try:
        return Target.model_validate(dict(artifact.target), strict=False)
    except ValidationError as error:
        raise InputRefused("DT309", f"the manifest of {artifact.folder} must hold its profile",
                           detail=str(error).splitlines()[:5], fix="export it again") from error  # fmt: skip


def _verify_golden(name: str, artifact: Artifact, options: Options) -> dict[str, Any]:
    parity = worker.run(f"verifying {name}", "deploytool.verify.parity:parity_job", options.limits,
                        artifact=str(artifact.folder), cases=str(artifact.folder / GOLDEN))  # fmt: skip
    wrong = judge_parity(parity, _limits(artifact).parity)
    said = ["the model is not here: compared with the recorded outputs of its golden cases only"]
    report, _ = read_report(artifact)
    said += filter(None, [unrecorded(parity["sizes"], parity["cases"], (report or {}).get("parity"))])
    return _result(name, artifact, parity, {}, None, wrong, said)


def _verify_with(name: str, artifact: Artifact, reference: Reference, how: _How) -> dict[str, Any]:
    limits = _limits(artifact).parity
    expected = reference.signature
    if (expected.inputs, expected.output_names) != (artifact.signature.inputs, artifact.signature.output_names):
        raise InputRefused("DT308", f"the artifact must take what the model {reference.ref.name!r} takes",
                           detail=[f"model:    {expected}", f"artifact: {artifact.signature}"],
                           fix="name the model that it was exported from with --model")  # fmt: skip
    noise = reference.noise()
    parity = {**reference.verify(artifact), "noise": noise}
    parity["derived"] = derived_limits(noise, arithmetic(artifact), limits)
    quality, generation = reference.quality_of(artifact, how.options.quality)
    nodes = _nodes(artifact, reference, how.options) if how.nodes else None
    wrong = judge_parity(parity, limits) + judge_nodes(nodes) + judge_quality(quality, generation, limits)
    changed = artifact.model["fingerprint"] != reference.prepared.fingerprint
    findings = ["the model, its files or the libraries have changed since the export"] if changed else []
    findings += unseen(parity, artifact.signature.input_names)
    findings += unjudged_said(nodes) if nodes else ["nodes were not judged by themselves: not asked for"]
    return {**_result(name, artifact, parity, quality, generation, wrong, findings), "nodes": nodes}


def _result(
    name: str, artifact: Artifact, parity: Mapping[str, Any], quality: Mapping[str, Any],
    generation: Mapping[str, Any] | None, wrong: Sequence[str], findings: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    return {
        "target": name,
        "status": "failed" if wrong else "ok",
        "reason": "; ".join(wrong) or None,
        "artifact": str(artifact.folder),
        "size_bytes": artifact.size_bytes,
        "precision": artifact.precision,
        "executed": artifact.executes,
        "ran": artifact.settings.get("ran"),
        "parity": {"passed": not judge_parity(parity, _limits(artifact).parity), **parity},
        "quality": dict(quality),
        "generation": generation,
        "speed": None,
        "memory": None,
        "findings": list(findings),
    }


def bench_again(paths: Sequence[Path], sizes: Mapping[str, int], options: Options, say: Say) -> dict[str, Any]:
    """Time the artifact at the first path against those at the others, or against its eager model when alone.

    Of language models with a cache, prefill and decoding are timed too: "decoding".
    `sizes` of free dimensions are those of the inputs; with none they are the first that were recorded.
    """
    with ExitStack() as stack:
        found = [stack.enter_context(_one_artifact(path)) for path in paths]
        candidate, others = found[0], found[1:]
        references = {f"{p}": a for p, a in zip(paths[1:], others, strict=True)}
        if not references:
            references = {"eager": _eager_of(candidate, options, stack)}
        for path, artifact in references.items():
            if artifact.signature.inputs != candidate.signature.inputs:
                raise InputRefused("DT308", f"artifacts must take the same inputs to be compared (got {path})",
                                   detail=[str(candidate.signature), str(artifact.signature)],
                                   fix="name artifacts of one model")  # fmt: skip
        case = stack.enter_context(inputs_at(candidate, sizes))
        result = {"artifact": str(paths[0]), **timed(candidate, references, case, options, say)}
        if decodes(candidate.signature):
            say("timing prefill and decoding")
            result["decoding"] = measure_decoding({"": candidate, **references}, options.limits, seed=options.seed)
        return result


@contextmanager
def inputs_at(artifact: Artifact, sizes: Mapping[str, int]) -> Iterator[Path]:
    """Recorded inputs of an artifact, cut or repeated to `sizes` of free dimensions; the first as it is with none."""
    recorded = case_files(artifact.folder / GOLDEN)
    with tempfile.TemporaryDirectory(prefix="deploytool-") as work:
        yield resized_case(artifact.signature, recorded, sizes, Path(work)) if sizes else recorded[0]


def timed(
    candidate: Artifact, references: Mapping[str, Artifact], case: Path, options: Options, say: Say
) -> dict[str, Any]:
    """What `compare` finds, and the "sizes" of the inputs."""
    figures = compare(candidate, references, case, limits=options.limits, budget_seconds=options.bench_seconds,
                      seed=options.seed, report=say)  # fmt: skip
    sizes = candidate.signature.bind(Case.load(case).inputs)
    return {"schema_version": SCHEMA_VERSION, "sizes": sizes, **figures}


@contextmanager
def _one_artifact(path: Path) -> Iterator[Artifact]:
    with opened(path) as artifacts:
        if len(artifacts) != 1:
            raise InputRefused("DT309", f"{path} must hold one artifact to be timed (got {', '.join(artifacts)})",
                               fix="name the folder of one target")  # fmt: skip
        artifact = next(iter(artifacts.values()))
        artifact.check()
        if not artifact.executes:
            raise InputRefused("DT313", f"{path} must run here to be timed (it was built for other hardware)",
                               fix="time it on its device")  # fmt: skip
        yield artifact


def _eager_of(artifact: Artifact, options: Options, stack: ExitStack) -> Artifact:
    ref = _model_of(artifact)
    if ref is None:
        raise InputRefused("DT301", "the artifact's model must be here to be timed against it",
                           fix="name a second artifact to compare with")  # fmt: skip
    work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deploytool-")))
    prepared = prepared_and_checked(ref, options, _from_graph(artifact))
    return Reference(ref, prepared, work, options.limits, options.seed).eager()


def replay(artifact: Artifact, cases: Sequence[Case], limits: worker.Limits = worker.NO_LIMITS) -> list[Outputs]:
    """The artifact's outputs for recorded inputs, computed in a worker: what the release gate replays with."""
    with tempfile.TemporaryDirectory(prefix="deploytool-") as folder:
        for index, case in enumerate(cases):
            Case(case.inputs).save(Path(folder) / "in" / f"{index:03d}.npz")
        worker.run(f"replaying {artifact.target['name']}", "deploytool.verify.parity:replay_job", limits,
                   artifact=str(artifact.folder), cases=f"{folder}/in", out=f"{folder}/out")  # fmt: skip
        return [case.outputs for case in read_cases(Path(folder) / "out")]


def check_release(
    candidate: Path, released: Path, gates: GateLimits, options: Options, say: Say, only: Sequence[str] = ()
) -> Verdict:
    """The release gate: `candidate` against `released`, each an artifact, an export's output, or a bundle.

    `only` names the targets to judge; all that were released where it is empty.
    """

    def compared(new: Artifact, old: Artifact) -> Mapping[str, Any]:
        say(f"{new.target['name']}: timing against the release")
        case = case_files(old.folder / GOLDEN)[0]
        found = compare(new, {"released": old}, case, limits=options.limits, budget_seconds=options.bench_seconds,
                        seed=options.seed)  # fmt: skip
        figures: dict[str, Any] = found["against"]["released"]
        return figures

    def replayed(artifact: Artifact, cases: Sequence[Case]) -> Sequence[Outputs]:
        say(f"{artifact.target['name']}: replaying {len(cases)} golden cases")
        return replay(artifact, cases, options.limits)

    with opened(candidate) as new, opened(released) as old:
        timing = compared if options.bench_seconds else None
        return check(new, old, replay=replayed, compare=timing, limits=gates, only=only)

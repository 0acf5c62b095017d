"""Finished artifacts looked at again: verify, bench and the release gate on folders and bundles."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact
from deploytool.backends.base import find_backend
from deploytool.backends.cut import CUTTERS
from deploytool.bench.compare import compare
from deploytool.bench.statistics import MIN_BLOCKS
from deploytool.bundle.contents import opened
from deploytool.cases import Case, case_files, read_cases
from deploytool.errors import InputRefused
from deploytool.gate.check import check
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
from deploytool.verify.sizes import unseen


def verify_again(
    path: Path, model: str | None, options: Options, say: Say, *, find_node: bool = False
) -> dict[str, Any]:
    """Parity, and the task metric, of every artifact at `path` against its model.

    The model is `model`, else the one that the artifact names. Where neither can be read, the reference outputs
    that were recorded with the artifact are compared, and the finding says so. With `find_node`, artifacts that fail
    are searched for the first wrong node, which needs the model.
    """
    results = []
    with opened(path) as artifacts, tempfile.TemporaryDirectory(prefix="deploytool-") as work:
        references: dict[tuple[ModelRef, bool], Reference] = {}
        for name, artifact in artifacts.items():
            artifact.check()
            say(f"{name}: verifying")
            ref = _model_of(artifact, model, options.samples)
            if find_node:
                _refuse_search(name, artifact, ref)
            if ref is None:
                results.append(_verify_golden(name, artifact, options))
                continue
            key = (ref, _from_graph(artifact))
            if key not in references:
                folder = Path(tempfile.mkdtemp(dir=work))
                prepared = prepared_and_checked(ref, options, key[1])
                references[key] = Reference(ref, prepared, folder, options.limits, options.seed)
            result = _verify_with(name, artifact, references[key], options)
            if find_node:
                say(f"{name}: searching for the first wrong node")
                result["bisect"] = _search(artifact, references[key], options, failed=not result["parity"]["passed"])
            results.append(result)
    for result in results:
        if not Path(result["artifact"]).is_relative_to(path):  # a tar's lay in a folder that is gone by now
            result["artifact"] = str(path)
    return {"schema_version": SCHEMA_VERSION, "path": str(path), "targets": results}


def _refuse_search(name: str, artifact: Artifact, ref: ModelRef | None) -> None:
    """Before any work: a search needs a graph, and the model to compare it with."""
    if artifact.backend not in CUTTERS:
        raise InputRefused("DT313", f"only an artifact with a graph can be bisected (got {name}, whose backend "
                           f"{artifact.backend!r} runs the module itself)", fix="choose another target")  # fmt: skip
    if ref is None:
        raise InputRefused("DT301", f"the model must be here to find where {name} parts from it (it is not)",
                           fix="name it with --model")  # fmt: skip


def _search(artifact: Artifact, reference: Reference, options: Options, *, failed: bool) -> dict[str, Any]:
    """What `verify --bisect` finds; nothing is searched where parity passed."""
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
    said = "the model is not here: compared with the recorded outputs of its golden cases only"
    return _result(name, artifact, parity, {}, None, wrong, [said])


def _verify_with(name: str, artifact: Artifact, reference: Reference, options: Options) -> dict[str, Any]:
    limits = _limits(artifact).parity
    expected = reference.signature
    if (expected.inputs, expected.output_names) != (artifact.signature.inputs, artifact.signature.output_names):
        raise InputRefused("DT308", f"the artifact must take what the model {reference.ref.name!r} takes",
                           detail=[f"model:    {expected}", f"artifact: {artifact.signature}"],
                           fix="name the model that it was exported from with --model")  # fmt: skip
    noise = reference.noise()
    parity = {**reference.verify(artifact), "noise": noise}
    parity["derived"] = derived_limits(noise, arithmetic(artifact), limits)
    quality, generation = reference.quality_of(artifact, options.quality)
    wrong = judge_parity(parity, limits) + judge_quality(quality, generation, limits)
    changed = artifact.model["fingerprint"] != reference.prepared.fingerprint
    findings = ["the model, its files or the libraries have changed since the export"] if changed else []
    findings += unseen(parity, artifact.signature.input_names)
    return _result(name, artifact, parity, quality, generation, wrong, findings)


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
        "parity": {"passed": not judge_parity(parity, _limits(artifact).parity), **parity},
        "quality": dict(quality),
        "generation": generation,
        "speed": None,
        "memory": None,
        "findings": list(findings),
    }


def bench_again(paths: Sequence[Path], options: Options, say: Say) -> dict[str, Any]:
    """Time the artifact at the first path against those at the others, or against its eager model when alone."""
    with ExitStack() as stack:
        found = [stack.enter_context(_one_artifact(path)) for path in paths]
        candidate, others = found[0], found[1:]
        references = {f"{p}": a for p, a in zip(paths[1:], others, strict=True)}
        if not references:
            references = {"eager": _eager_of(candidate, options, stack)}
        for path, artifact in references.items():
            if artifact.signature.inputs != candidate.signature.inputs:
                raise InputRefused("DT308", f"artifacts must take the same inputs to be compared (got {path})",
                                   detail=[str(candidate.signature), str(artifact.signature)])  # fmt: skip
        case = case_files(candidate.folder / GOLDEN)[0]
        timed = compare(candidate, references, case, limits=options.limits, budget_seconds=options.bench_seconds,
                        seed=options.seed, report=say)  # fmt: skip
    return {"schema_version": SCHEMA_VERSION, "artifact": str(paths[0]), **timed}


@contextmanager
def _one_artifact(path: Path) -> Iterator[Artifact]:
    with opened(path) as artifacts:
        if len(artifacts) != 1:
            raise InputRefused("DT309", f"{path} must hold one artifact to be timed (got {', '.join(artifacts)})",
                               fix="name the folder of one target")  # fmt: skip
        artifact = next(iter(artifacts.values()))
        artifact.check()
        if not artifact.executes:
            raise InputRefused("DT313", f"{path} must run here to be timed (it was built for other hardware)")
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


def check_release(candidate: Path, released: Path, gates: GateLimits, options: Options, say: Say) -> Verdict:
    """The release gate: `candidate` against `released`, each an artifact, an export's output, or a bundle."""

    def compared(new: Artifact, old: Artifact) -> Mapping[str, Any]:
        say(f"{new.target['name']}: timing against the release")
        case = case_files(old.folder / GOLDEN)[0]
        timed = compare(new, {"released": old}, case, limits=options.limits, budget_seconds=options.bench_seconds,
                        seed=options.seed)  # fmt: skip
        figures: dict[str, Any] = timed["against"]["released"]
        return figures if figures["blocks"] >= MIN_BLOCKS else {**figures, "speedup_ci": None}

    def replayed(artifact: Artifact, cases: Sequence[Case]) -> Sequence[Outputs]:
        say(f"{artifact.target['name']}: replaying {len(cases)} golden cases")
        return replay(artifact, cases, options.limits)

    with opened(candidate) as new, opened(released) as old:
        return check(new, old, replay=replayed, compare=compared if options.bench_seconds else None, limits=gates)

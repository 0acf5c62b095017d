"""One search from start to end: what was asked, the search itself, and what is written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from deploytool.artifact import MANIFEST, REPORT, Artifact
from deploytool.backends.base import find_backend, load_checked_target
from deploytool.bench.compare import compare, headline
from deploytool.bench.energy import MachineMeter
from deploytool.bench.environment import environment
from deploytool.bench.sizes import resized_case
from deploytool.compress.recipe import find_recipe, load_recipe
from deploytool.errors import EnvironmentLacking, UsageProblem
from deploytool.load.resolve import resolve
from deploytool.pipeline.export import Options
from deploytool.pipeline.needs import needs, refuse_impossible, weights_of
from deploytool.pipeline.reference import Reference
from deploytool.report.rows import Page
from deploytool.source import ModelRef
from deploytool.storage import refuse_existing, sha256_file, work_folder, write_bytes, write_json
from deploytool.target import Target
from deploytool.tune.buckets import PACKED, PARTS, best_per_bucket, write_packed
from deploytool.tune.engine import Start, here
from deploytool.tune.front import front, plot, tune_grid
from deploytool.tune.models import Models
from deploytool.tune.project import CHOSEN, model_name, profile_of, write_artifact, write_project
from deploytool.tune.search import Search
from deploytool.tune.space import bases
from deploytool.tune.station import Terms, takes_graph
from deploytool.tune.store import Store
from deploytool.tune.trial import Question, Trial, distinct
from deploytool.tune.workshop import Workshop
from deploytool.worker import NO_LIMITS, Limits

SCHEMA_VERSION = "1.0"
RESULT = "tune.json"
_STORE = "tune.sqlite"


@dataclass(frozen=True)
class Plan:
    """What will be searched: printed before work starts.

    sizes     free sizes of each bucket; an empty one is the model's first sample
    """

    model: ModelRef
    typed: str
    targets: tuple[Target, ...]
    unavailable: Mapping[str, str]
    recipes: tuple[Path, ...]
    sizes: tuple[Mapping[str, int], ...]

    def to_json(self, question: Question, out: Path) -> dict[str, Any]:
        asked = asdict(question)
        return {"model": asdict(self.model), "targets": [t.name for t in self.targets], **asked,
                "unavailable": dict(self.unavailable), "recipes": [r.stem for r in self.recipes],
                "output": str(out), "configurations": len(bases(self.targets, self.recipes))}  # fmt: skip


def make_plan(
    model: str, targets: Sequence[str], recipes: Sequence[str], sizes: Sequence[Mapping[str, int]], out: Path,
    limits: Limits = NO_LIMITS,
) -> Plan:  # fmt: skip
    """Resolve names and check files; raises before any work is done. A folder that a search wrote is gone on with.

    Raises EnvironmentLacking when the disk cannot hold a graph and each target of the model itself. What recipes leave
    of its weights is not known before they ran, and what is varied depends on what is found.
    """
    ref = resolve(model)
    refuse_existing(out, True, _STORE)
    profiles = [load_checked_target(name) for name in dict.fromkeys(targets)]
    names = [profile.name for profile in profiles]
    if len(set(names)) < len(names):
        raise UsageProblem("DT201", f"every target must have a name of its own (got {', '.join(names)})",
                           fix="change `name` in one of the profiles")  # fmt: skip
    probes = {p.name: find_backend(p.backend).probe(p) for p in profiles}
    able = tuple(p for p in profiles if probes[p.name].available)
    if not able:
        raise EnvironmentLacking("DT401", "at least one target must be buildable here (none is)",
                                 detail=[f"{n}: {p.reason}" for n, p in probes.items()])  # fmt: skip
    needed = needs(weights_of(ref), able, any(map(takes_graph, able)))
    goes_on = (out / _STORE).exists()  # and has its graph and its builds already
    refuse_impossible(replace(needed, cache=0, output=0) if goes_on else needed, out, limits)
    paths = tuple(find_recipe(name) for name in recipes)
    for path in paths:
        load_recipe(path)
    unavailable = {n: p.reason for n, p in probes.items() if not p.available}
    return Plan(ref, model, able, unavailable, paths, tuple(sizes) or ({},))


def bucket_names(sizes: Sequence[Mapping[str, int]]) -> tuple[str, ...]:
    """What the figures of each bucket are called."""
    return tuple(",".join(f"{k}={v}" for k, v in one.items()) or "sample" for one in sizes)


def tune(
    plan: Plan, question: Question, options: Options, say: Callable[[str], None], start: Start = here
) -> dict[str, Any]:
    """Search; returns what `tune --json` prints, and writes it with the chosen artifact into `options.out`.

    `start` gives the stations that work for the search. One that was stopped goes on where it was. Raises CheckFailed
    when nothing keeps the quality, and EnvironmentLacking when energy is asked for and cannot be read.
    """
    if question.objective == "energy":
        MachineMeter()  # raises before any work is done
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    with Store(out) as store, Models(plan.model, out, options, store, say) as models:
        reference = models.reference(None, any(map(takes_graph, plan.targets)))
        cases = [resized_case(reference.signature, reference.cases, sizes, out / "cases") if sizes
                 else reference.cases[0] for sizes in plan.sizes]  # fmt: skip
        # Ours to remove: a station on another machine may be ended from outside.
        with work_folder(out) as work:
            terms = Terms(work, tuple(cases), options.limits, options.seed, options.quality,
                          question.objective == "energy")  # fmt: skip
            with start(terms) as stations:
                shop = Workshop(models, out, stations, store, options.seed, say)
                search = Search(shop, stations, store, question, cases, say)
                chosen = search.run(bases(plan.targets, plan.recipes))
                best = best_per_bucket(search, chosen) if question.pack else []
        return _finish(plan, question, options, search, chosen, best, models, cases[0], say)


def _finish(
    plan: Plan, question: Question, options: Options, search: Search, chosen: Trial, best: Sequence[Trial],
    models: Models, case: Path, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    assert chosen.product is not None and chosen.quality is not None
    out = options.out
    compressed = models.compressed_folder(chosen.config.recipe) if chosen.config.recipe else None
    reference = models.reference(None, False)
    name = model_name(plan.typed, plan.model, out)
    made = {trial.config.name: _written(out, trial, question, number) for number, trial
            in enumerate(distinct([chosen, *best], search.key))}  # fmt: skip
    profiles = [f"{artifact.folder.relative_to(out)}.toml" for artifact in made.values()]
    write_project(out, name, chosen.config, question.max_drop, compressed, profiles)
    found = [search.figures(trial) for trial in search.trials.values()]
    result = {
        "schema_version": SCHEMA_VERSION, "model": plan.model.name, "objective": question.objective,
        "max_drop": question.max_drop, "budget_seconds": question.budget_seconds, "spent_seconds": search.spent,
        "environment": environment(), "anchor": search.anchor.config.name if search.anchor else None,
        "buckets": list(question.buckets), "chosen": search.figures(chosen), "front": front(found),
        "configurations": found, "unavailable": dict(plan.unavailable), "artifact": str(out / CHOSEN),
        "findings": _findings(search, chosen, reference),
    }  # fmt: skip
    for trial in distinct([chosen, *best], search.key):
        how = options if trial is chosen else replace(options, bench_seconds=0.0)
        _report(made[trial.config.name], result, trial, reference, case, how, say)
    if best:
        by_key = {search.key(trial): made[trial.config.name] for trial in distinct([chosen, *best], search.key)}
        manifest = write_packed(out, [by_key[search.key(t)] for t in best], plan.sizes, plan.model.name)
        result["packed"] = {"bundle": str(out / PACKED), "buckets": [b.model_dump() for b in manifest.buckets or ()]}
    write_json(out / RESULT, result)
    _picture(out, result)
    return result


def _written(out: Path, trial: Trial, question: Question, number: int) -> Artifact:
    """A trial's artifact in the output: the chosen one is number 0."""
    assert trial.product is not None
    profile = profile_of(trial.config, question.max_drop, number)
    name = f"{PARTS}/{profile.name}" if number else CHOSEN
    (out / name).parent.mkdir(exist_ok=True)
    write_artifact(out, name, profile, trial.product.artifact.folder)
    return _renamed(out / name, profile, trial.product.parity.get("ran"))


def _renamed(folder: Path, profile: Target, ran: Mapping[str, Any] | None) -> Artifact:
    """The artifact with the chosen profile, its runtime settings and what it runs in its manifest."""
    artifact = Artifact.load(folder)
    settings = {**artifact.settings, **profile.runtime.model_dump(mode="json"), "ran": ran}
    return replace(artifact, target=profile.to_json(), settings=settings).save(known=artifact.files)


def _report(
    artifact: Artifact, result: Mapping[str, Any], chosen: Trial, reference: Reference, case: Path, options: Options,
    say: Callable[[str], None],
) -> None:  # fmt: skip
    """Write the chosen artifact's report, with its speed against the eager module where timing is wanted."""
    assert chosen.product is not None and chosen.quality is not None
    speed = memory = None
    parity = dict(chosen.product.parity)
    if options.bench_seconds > 0:
        say("timing the chosen artifact against the eager module")
        speed = compare(artifact, {"eager": reference.eager()}, case, limits=options.limits,
                        budget_seconds=options.bench_seconds, seed=options.seed)  # fmt: skip
        eager = speed["against"]["eager"]
        memory = {"peak_rss_bytes": speed.pop("peak_rss_bytes")}
        speed |= {"reference_p50_ms": eager["p50_ms"], **headline(eager)}
    write_json(artifact.folder / REPORT, {
        "schema_version": SCHEMA_VERSION, "model": result["model"], "environment": result["environment"],
        "target": artifact.target["name"], "status": "ok", "reason": None, "artifact": ".",
        "artifact_digest": sha256_file(artifact.folder / MANIFEST), "size_bytes": artifact.size_bytes,
        "precision": artifact.precision, "executed": artifact.executes,
        "ran": parity.pop("ran", None),
        "parity": {"passed": True, "shapes": reference.prepared.info["shapes"], **parity},
        **{key: chosen.quality[key] for key in ("compression", "quality", "generation")},
        "speed": speed, "memory": memory, "findings": result["findings"], "seconds": dict(chosen.product.seconds),
    })  # fmt: skip


def _findings(search: Search, chosen: Trial, reference: Reference) -> list[str]:
    said = []
    if search.out_of_time:
        said.append("the budget was used up before everything near the best was tried")
    if reference.prepared.info["synthetic"]:
        said.append("the samples are synthetic: neither quality nor parity on your own data is shown")
    assert chosen.quality is not None
    if not chosen.quality["quality"]:
        said.append(f"the drop is {chosen.quality['drop_of']} not a loss of a task metric")
    changes = dict(chosen.config.changes)
    if changes.get("build.reduce_range") is False or changes.get("build.weight_bits") == 8:
        said.append("8-bit weights: exact on this CPU, and may saturate on CPUs without VNNI")
    return said


def _picture(out: Path, result: Mapping[str, Any]) -> None:
    """The front as a picture, and as one HTML page where the extra `report` is there."""
    picture = plot(result)
    if not picture:
        return
    write_bytes(out / "tune.svg", picture.encode())
    with contextlib.suppress(ImportError):
        from deploytool.report.html import page_html

        page = page_html(Page(f"Search over {result['model']}", (), tune_grid(result)))
        write_bytes(out / "tune.html", page.replace("</body>", f"{picture}</body>").encode())

"""deploytool tune"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.errors import UsageProblem
from deploytool.report.plan import plan_table
from deploytool.worker import Limits


class Duration(click.ParamType):  # type: ignore[type-arg]
    """Seconds, or a number with s, m or h: 90, 90s, 20m, 1.5h."""

    name = "duration"
    _UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}  # noqa: RUF012

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", str(value))
        seconds = float(found[1]) * self._UNITS[found[2]] if found else 0.0
        if not seconds:
            self.fail(f"{value!r} must be a time above 0 such as 90s, 20m or 1h", param, ctx)
        return seconds


def _refuse_unpackable(objective: str, sizes: tuple[dict[str, int], ...]) -> None:
    """Before any work is done: what --pack cannot make a table of."""
    if objective not in ("latency", "energy") or len({tuple(sorted(s)) for s in sizes}) != 1:
        raise UsageProblem("DT201", "--pack must stand with the objective latency or energy, and with --at sizes of "
                           f"the same dimensions (got {objective}, {len(sizes)} sizes)")  # fmt: skip
    if len({tuple(sorted(s.items())) for s in sizes}) < len(sizes):
        raise UsageProblem("DT201", "--pack must stand with --at sizes that differ (got the same ones twice)")


@click.command("tune")
@click.argument("model", required=False)
@click.option("-t", "--target", "targets", multiple=True, help="A target to search over; repeat it, or `all`.")
@click.option("-r", "--recipe", "recipes", multiple=True, help="A compression recipe to try too; repeat it.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder; an unfinished search in it goes on.")
@click.option("--max-drop", default="1%", type=options.SHARE_OF_ALL, show_default=True,
              help="What any metric may lose: 1% or 0.01.")  # fmt: skip
@click.option("--objective", type=click.Choice(["latency", "size", "memory", "energy"]), default="latency",
              show_default=True, help="What is made small.")  # fmt: skip
@click.option("--budget", default="20m", type=Duration(), show_default=True, help="Time for the search.")
@click.option("--at", "sizes", multiple=True, type=options.SIZES,
              help="Sizes to time at, batch=1,sequence=64; repeat it for several.")  # fmt: skip
@click.option("--exhaustive", is_flag=True, help="Try every combination of settings, whatever it takes.")
@click.option("--pack", is_flag=True, help="Ship the best artifact for every --at size, packed as one.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
              help="What does the work: this process, or the nodes of a Ray cluster.")  # fmt: skip
@click.option("--address", default=None, metavar="HOST:PORT",
              help="The cluster; `auto` is the one that runs here; without it one is started.")  # fmt: skip
@click.option("--bench-seconds", default=10.0, type=options.SECONDS_OR_NONE, show_default=True,
              help="Time for the chosen artifact's own report.")  # fmt: skip
@options.seed_option
@options.limits_options
@options.dry_run_option
@options.quiet_option
@options.json_option
def command(
    model: str | None, targets: tuple[str, ...], recipes: tuple[str, ...], output: Path | None, max_drop: float,
    objective: Any, budget: float, sizes: tuple[dict[str, int], ...], exhaustive: bool, pack: bool, engine: str,
    address: str | None, bench_seconds: float, seed: int, limits: Limits, dry_run: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Search for the best artifact of MODEL that loses at most --max-drop.

    Targets, their settings, recipes and runtime settings are tried, cheap checks first and interleaved timing last.
    """
    from deploytool.pipeline.export import ALL, Options
    from deploytool.target import target_names
    from deploytool.tune.engine import here
    from deploytool.tune.ray_cluster import cluster, import_ray
    from deploytool.tune.run import bucket_names, make_plan, tune
    from deploytool.tune.trial import Question

    if address is not None and engine != "ray":
        raise UsageProblem("DT201", "--address must stand with --engine ray (got none)")
    if pack:
        _refuse_unpackable(objective, sizes)
    if engine == "ray":
        import_ray(address)  # before any work is done
    say = options.say(quiet and not dry_run)  # the plan is all that a dry run is for
    name = options.model_or_default(model, say)
    chosen = [n for t in options.targets_or_default(targets) for n in (target_names() if t == ALL else [t])]
    out = output or Path("deploytool-tune") / Path(name).stem
    plan = make_plan(name, chosen, recipes, sizes, out, limits)
    question = Question(objective, max_drop, budget, bucket_names(plan.sizes), exhaustive, seed, pack)
    told = {**plan.to_json(question, out), "engine": engine, **({"address": address} if address else {})}
    say(plan_table(told))
    if dry_run:
        if as_json:
            options.print_json({"schema_version": "1.0", "plan": told})
        return
    for target, reason in plan.unavailable.items():
        say(f"{target}: unavailable, {reason}")
    how = Options(out=out, bench_seconds=bench_seconds, seed=seed, limits=limits)
    start = partial(cluster, address=address, say=say) if engine == "ray" else here
    result = tune(plan, question, how, say, start)
    if as_json:
        options.print_json(result)
    else:
        from deploytool.report.table import grid_table
        from deploytool.tune.front import tune_grid

        click.echo(grid_table(tune_grid(result)))
        click.echo(f"chosen: {result['chosen']['name']}; `cd {out} && deploytool export` makes it again")

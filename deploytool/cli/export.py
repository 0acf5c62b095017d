"""deploytool export"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.errors import CheckFailed, EnvironmentLacking, from_json
from deploytool.pipeline.ahead import Ahead
from deploytool.report.plan import plan_table
from deploytool.worker import Limits


@click.command("export")
@click.argument("model", required=False)
@click.option("-t", "--target", "targets", multiple=True, help="A target's name or profile; repeat it, or `all`.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder for the artifacts, one each.")
@options.overwrite_option
@click.option("--bench-seconds", default=10.0, type=options.SECONDS_OR_NONE, show_default=True,
              help="Time for timing each target.")  # fmt: skip
@click.option("--no-bench", is_flag=True, help="Leave timing out.")
@click.option("--keep-best", is_flag=True, help="Keep the plain artifact where one below fp32 is no better.")
@click.option("--no-quality", is_flag=True, help="Leave the task metric and decoding checks out.")
@click.option("--exporter", type=click.Choice(["auto", "torchscript", "dynamo"]), default="auto", show_default=True,
              help="How the ONNX graph is made; auto traces, and uses dynamo where tracing is wrong.")  # fmt: skip
@click.option("--no-cache", is_flag=True, help="Lower again even when nothing changed.")
@options.samples_option
@options.seed_option
@options.limits_options
@options.dry_run_option
@options.quiet_option
@options.json_option
def command(
    model: str | None, targets: tuple[str, ...], output: Path | None, overwrite: bool, bench_seconds: float,
    no_bench: bool, keep_best: bool, no_quality: bool, exporter: str, no_cache: bool, samples: Path | None, seed: int,
    limits: Limits, dry_run: bool, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Lower MODEL, build it for each target, verify and time it; one artifact folder per target.

    MODEL is a shipped name, a Python model file, a Hugging Face folder or id, an ONNX file, or a folder that compress
    wrote.
    """
    say = options.say(quiet and not dry_run)  # the plan is all that a dry run is for
    name = options.model_or_default(model, say)
    with Ahead(limits) as ahead:
        if not dry_run and not no_cache:
            ahead.expect_lowering(name, exporter, str(seed))  # before the imports below, which take as long
        from deploytool.pipeline.export import Options, export, make_plan

        chosen = options.targets_or_default(targets)
        out = output or Path("deploytool-out") / Path(name).stem
        how = Options(out=out, overwrite=overwrite, bench_seconds=0.0 if no_bench else bench_seconds,
                      quality=not no_quality, exporter=exporter, seed=seed, cache=not no_cache, limits=limits,
                      samples=samples, keep_best=keep_best)  # fmt: skip
        plan = make_plan(name, chosen, how)
        say(plan_table(plan.to_json(how)))
        if dry_run:
            if as_json:
                options.print_json({"schema_version": "1.0", "plan": plan.to_json(how)})
            return 0
        for target, (reason, fix) in plan.unavailable.items():
            say(f"{target}: unavailable, {reason}; {fix}")
        report = export(plan, how, say, ahead)
    if as_json:
        options.print_json(report)
    else:
        from deploytool.report.table import export_table

        click.echo(export_table(report))
    return exit_code(report, asked_all="all" in chosen)


def exit_code(report: dict[str, Any], *, asked_all: bool) -> int:
    """0 when every target that was asked for is ok; else what the first failure means."""
    for result in report["targets"]:
        if result["status"] == "failed":
            return from_json(result["error"]).exit_code if "error" in result else CheckFailed.exit_code
    missing = [r for r in report["targets"] if r["status"] == "unavailable"]
    return EnvironmentLacking.exit_code if missing and (not asked_all or len(missing) == len(report["targets"])) else 0

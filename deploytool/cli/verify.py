"""deploytool verify"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.errors import CheckFailed, UsageProblem, from_json, gravest
from deploytool.worker import Limits


@click.command("verify")
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=None, help="The model to compare with; default: the one that the artifact names.")
@click.option("--no-quality", is_flag=True, help="Leave the task metric and decoding checks out.")
@click.option("--no-nodes", is_flag=True, help="Judge the outputs alone, not each node by itself.")
@click.option("--bisect", is_flag=True, help="Find the first wrong node of artifacts that fail.")
@click.option("--saved", is_flag=True, help="Judge the figures of the saved report; nothing is run.")
@click.option("--limits-of", default=None, metavar="TARGET", help="With --saved: the profile to judge by.")
@options.samples_option
@options.seed_option
@options.limits_options
@options.quiet_option
@options.json_option
def command(
    artifact: Path, model: str | None, no_quality: bool, no_nodes: bool, bisect: bool, saved: bool,
    limits_of: str | None, samples: Path | None, seed: int, limits: Limits, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Compare the ARTIFACT (a folder, an export's output, or a bundle) with its model again."""
    if saved and (bisect or model or samples):
        raise UsageProblem("DT201", "--saved must stand without --bisect, --model and --samples: nothing is run")
    if limits_of and not saved:
        raise UsageProblem("DT201", "--limits-of must stand with --saved (an artifact carries its profile)")
    if saved:
        from deploytool.pipeline.saved import judge_saved

        report = judge_saved(artifact, limits_of)
    else:
        from deploytool.pipeline.again import verify_again
        from deploytool.pipeline.export import Options

        how = Options(out=artifact, quality=not no_quality, seed=seed, limits=limits, samples=samples)
        report = verify_again(artifact, model, how, options.say(quiet), find_node=bisect, nodes=not no_nodes)
    if as_json:
        options.print_json(report)
    else:
        _show(report)
    return gravest(_exit_code(result) for result in report["targets"])


def _exit_code(result: Mapping[str, Any]) -> int:
    """An artifact that could not be judged has the error's own."""
    if "error" in result:
        return from_json(result["error"]).exit_code
    return 0 if result["status"] == "ok" else CheckFailed.exit_code


def _show(report: Mapping[str, Any]) -> None:
    from deploytool.report.table import export_table
    from deploytool.verify.told import described

    click.echo(export_table(report))
    for result in report["targets"]:
        if "bisect" in result:
            click.echo("\n".join(f"{result['target']}: {line}" for line in described(result["bisect"])))

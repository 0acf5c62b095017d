"""deploytool verify"""

from __future__ import annotations

from pathlib import Path

import click

from deploytool.cli import options
from deploytool.worker import Limits


@click.command("verify")
@click.argument("artifact", type=click.Path(exists=True, path_type=Path))
@click.option("--model", default=None, help="The model to compare with; default: the one that the artifact names.")
@click.option("--no-quality", is_flag=True, help="Leave the task metric and decoding checks out.")
@options.samples_option
@options.seed_option
@options.limits_options
@options.quiet_option
@options.json_option
def command(
    artifact: Path, model: str | None, no_quality: bool, samples: Path | None, seed: int, limits: Limits, quiet: bool,
    as_json: bool,
) -> int:  # fmt: skip
    """Compare the ARTIFACT (a folder, an export's output, or a bundle) with its model again."""
    from deploytool.pipeline.again import verify_again
    from deploytool.pipeline.export import Options

    how = Options(out=artifact, quality=not no_quality, seed=seed, limits=limits, samples=samples)
    report = verify_again(artifact, model, how, options.say(quiet))
    if as_json:
        options.print_json(report)
    else:
        from deploytool.report.table import export_table

        click.echo(export_table(report))
    return 0 if all(result["status"] == "ok" for result in report["targets"]) else 1

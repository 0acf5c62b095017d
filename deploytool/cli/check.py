"""deploytool check"""

from __future__ import annotations

from pathlib import Path

import click

from deploytool.cli import options
from deploytool.errors import IntegrityBroken
from deploytool.worker import Limits

_EXIT = {"passed": 0, "failed": 1, "inconclusive": 7}


@click.command("check")
@click.argument("candidate", type=click.Path(exists=True, path_type=Path))
@click.option("--against", "released", required=True, type=click.Path(exists=True, path_type=Path),
              help="What was released: an artifact, an export's output, or a bundle.")  # fmt: skip
@click.option("-t", "--target", "targets", multiple=True, metavar="NAME",
              help="Judge this target alone; repeat it for several. Default: all that were released.")  # fmt: skip
@click.option("--max-drop", default=0.01, type=options.SHARE_OF_ALL, show_default=True,
              help="Share of a task metric that may be lost.")  # fmt: skip
@click.option("--max-growth", default=0.05, type=options.SHARE, show_default=True,
              help="Share by which the size may grow.")  # fmt: skip
@click.option("--max-slowdown", default=0.10, type=options.SHARE, show_default=True,
              help="Share by which a run may take longer.")  # fmt: skip
@click.option("--no-latency", is_flag=True, help="Do not time the two against each other.")
@click.option("--new-model", is_flag=True, help="The candidate was trained anew: other outputs are expected.")
@click.option("--seconds", default=20.0, type=options.SECONDS, show_default=True, help="Time for timing each target.")
@options.seed_option
@options.limits_options
@options.quiet_option
@options.json_option
def command(
    candidate: Path, released: Path, targets: tuple[str, ...], max_drop: float, max_growth: float, max_slowdown: float,
    no_latency: bool, new_model: bool, seconds: float, seed: int, limits: Limits, quiet: bool, as_json: bool,
) -> int:  # fmt: skip
    """Gate CANDIDATE against what was released: contract, golden replay, metrics, size and speed on this machine.

    Exit code 0: passed; 1: failed; 6: a file of either is not the one that was recorded; 7: inconclusive.
    """
    from deploytool.gate.limits import GateLimits
    from deploytool.pipeline.again import check_release
    from deploytool.pipeline.export import Options

    gates = GateLimits(metric_drop_max=max_drop, size_growth_max=max_growth,
                       slowdown_max=None if no_latency else max_slowdown, new_model=new_model)  # fmt: skip
    how = Options(out=candidate, bench_seconds=0.0 if no_latency else seconds, seed=seed, limits=limits)
    verdict = check_release(candidate, released, gates, how, options.say(quiet), targets)
    if as_json:
        options.print_json(verdict.to_json())
    else:
        from deploytool.report.table import check_table

        click.echo(check_table(verdict))
    damaged = any(finding.gate == "integrity" and finding.status == "fail" for finding in verdict.findings)
    return IntegrityBroken.exit_code if damaged else _EXIT[verdict.status]

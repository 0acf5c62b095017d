"""deploytool bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.worker import Limits


@click.command("bench")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", default=20.0, type=options.SECONDS, show_default=True, help="Time for timing.")
@options.seed_option
@options.limits_options
@options.quiet_option
@options.json_option
def command(
    artifacts: tuple[Path, ...], seconds: float, seed: int, limits: Limits, quiet: bool, as_json: bool
) -> None:
    """Time the first of ARTIFACTS against the others, interleaved; alone, against its eager model."""
    from deploytool.pipeline.again import bench_again
    from deploytool.pipeline.export import Options

    how = Options(out=artifacts[0], bench_seconds=seconds, seed=seed, limits=limits)
    result = bench_again(artifacts, how, options.say(quiet))
    if as_json:
        options.print_json(result)
    else:
        click.echo("\n".join(_lines(result)))


def _lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['artifact']}: p50 {result['p50_ms']:.3f} ms over {result['runs']} runs"]
    for name, other in result["against"].items():
        ratio = "no ratio"
        if other["speedup"] is not None:
            low, high = other["speedup_ci"]
            ratio = f"{other['speedup']:.2f}x [{low:.2f}, {high:.2f}]"
        p50 = "-" if other["p50_ms"] is None else f"{other['p50_ms']:.3f} ms"
        lines.append(f"  against {name} (p50 {p50}): {ratio}, {other['verdict']}")
    return lines + [f"  note: {note}" for note in result["notes"]]

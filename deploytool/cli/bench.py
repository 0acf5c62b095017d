"""deploytool bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.errors import UsageProblem
from deploytool.report.rows import speedup_text
from deploytool.worker import Limits


@click.command("bench")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--seconds", default=12.0, type=options.SECONDS, show_default=True, help="Time for timing.")
@click.option("--aa", "against_itself", is_flag=True, help="Time the artifact against itself: the machine's noise.")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(1, 65536),
              help="Measure throughput at this batch size instead; repeat it.")  # fmt: skip
@click.option("--at", "sizes", type=options.SIZES, default=dict,
              help="Sizes to time at, batch=1,sequence=64; those of the first sample else.")  # fmt: skip
@click.option("--roofline", is_flag=True, help="Tell what share of the machine's speed it reaches.")
@options.seed_option
@options.limits_options
@options.quiet_option
@options.json_option
def command(
    artifacts: tuple[Path, ...], seconds: float, against_itself: bool, batches: tuple[int, ...],
    sizes: dict[str, int], roofline: bool, seed: int, limits: Limits, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time the first of ARTIFACTS against the others, interleaved; alone, against its eager model."""
    from deploytool.bench.decoding import told
    from deploytool.pipeline.again import bench_again
    from deploytool.pipeline.export import Options
    from deploytool.pipeline.timing import noise_of, roofline_of, throughput_of

    how = Options(out=artifacts[0], bench_seconds=seconds, seed=seed, limits=limits)
    alone = [against_itself, bool(batches), roofline]
    if any(alone) and (len(artifacts) > 1 or sum(alone) > 1):
        raise UsageProblem("DT201", "--aa, --batch and --roofline each look at one artifact alone (got more)",
                           fix="name one artifact, and one of the three")  # fmt: skip
    if batches and sizes:
        raise UsageProblem("DT201", "--batch measures at batch sizes of its own (got --at as well)",
                           fix="leave one of the two out")  # fmt: skip
    if batches:
        result = throughput_of(artifacts[0], list(dict.fromkeys(batches)), how)
        lines = [f"batch {r['batch']}: {r['items_per_s']:.1f} items/s, p50 {r['p50_ms']:.3f} ms over {r['runs']} runs"
                 for r in result["throughput"]]  # fmt: skip
    elif against_itself:
        result = noise_of(artifacts[0], sizes, how, options.say(quiet))
        lines = [*_lines(result), _noise_line(result["noise"])]
    elif roofline:
        result = roofline_of(artifacts[0], sizes, how, options.say(quiet))
        lines = [*_lines(result), _roofline_line(result["roofline"])]
    else:
        result = bench_again(artifacts, sizes, how, options.say(quiet))
        lines = _lines(result)
        if "decoding" in result:
            lines.append(f"  {told(result['decoding'])}")
    if as_json:
        options.print_json(result)
    else:
        click.echo("\n".join(lines))


def _noise_line(noise: dict[str, Any]) -> str:
    if noise["detectable"] is None:
        return "  noise floor: not known, too few undisturbed blocks for an interval: allow more time"
    return f"  noise floor: differences below {noise['detectable']:.1%} cannot be seen in this time on this machine"


def _roofline_line(found: dict[str, Any]) -> str:
    both = " and ".join(f"{_peaks_text(found['peaks'][when])} {when}" for when in ("before", "after"))
    return (f"  roofline: {found['floor_ms']:.3f} ms at least, by {found['bound']}; {found['share']:.0%} of it reached "
            f"({_peaks_text(found)}; {both})")  # fmt: skip


def _peaks_text(peaks: dict[str, float]) -> str:
    return f"{peaks['flops'] / 1e9:.0f} GFLOP/s, {peaks['read_bytes_per_s'] / 1e9:.1f} GB/s"


def _lines(result: dict[str, Any]) -> list[str]:
    times = ", ".join(f"{label} {result[f'{label}_ms']:.3f} ms" for label in ("p50", "p90", "p99"))
    lines = [f"{result['artifact']}: {times} over {result['runs']} runs"]
    for name, other in result["against"].items():
        ratio = "no ratio" if other["speedup"] is None else speedup_text(other)
        p50 = "-" if other["p50_ms"] is None else f"{other['p50_ms']:.3f} ms"
        lines.append(f"  against {name} (p50 {p50}): {ratio}, {other['verdict']}")
    return lines + [f"  note: {note}" for note in result["notes"]]

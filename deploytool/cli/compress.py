"""deploytool compress"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from deploytool.cli import options
from deploytool.errors import UsageProblem
from deploytool.report.plan import plan_table
from deploytool.worker import Limits


@click.command("compress")
@click.argument("model", required=False)
@click.option("--recipe", required=True, help="A TOML file, or a shipped recipe's name.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder; it is a MODEL again.")
@options.overwrite_option
@click.option("--no-quality", is_flag=True, help="Leave the metrics before and after out.")
@click.option("--explain", is_flag=True, help="Say what each step would do to MODEL and what to expect, and stop.")
@options.seed_option
@options.limits_options
@options.dry_run_option
@options.quiet_option
@options.json_option
def command(
    model: str | None, recipe: str, output: Path | None, overwrite: bool, no_quality: bool, explain: bool, seed: int,
    limits: Limits, dry_run: bool, quiet: bool, as_json: bool,
) -> None:  # fmt: skip
    """Run the recipe's steps on MODEL; the output folder is a MODEL again."""
    from deploytool import worker
    from deploytool.compress.recipe import find_recipe, load_recipe
    from deploytool.load.resolve import COMPRESSED, resolve
    from deploytool.pipeline.needs import compression_needs, refuse_impossible, weights_of
    from deploytool.storage import refuse_existing

    first = os.environ.get("RANK", "0") == "0"  # torchrun starts the command several times, and one of them speaks
    say = options.say((quiet and not dry_run) or not first)
    path = find_recipe(recipe)
    steps = load_recipe(path)
    ref = resolve(model or steps.model or options.model_or_default(None, say))
    if not ref.has_module:
        raise UsageProblem("DT204", f"the model must be a PyTorch module to be compressed (got the graph {ref.name})",
                           fix="compress the module before it is exported, and export the result")  # fmt: skip
    if explain:
        told = worker.run(f"explaining {ref.name}", "deploytool.compress.explain:explain_job", limits, say,
                          ref=asdict(ref), recipe_path=str(path.absolute()), seed=seed)  # fmt: skip
        options.print_json(told) if as_json else click.echo("\n".join(_explained(told)))
        return
    if output is None:
        raise UsageProblem("DT201", "-o must name the folder to write (got none)",
                           fix="add -o FOLDER, or --explain to have nothing written")  # fmt: skip
    refuse_existing(output, overwrite, COMPRESSED)
    refuse_impossible(compression_needs(weights_of(ref)), output, limits)
    plan = {"model": asdict(ref), "recipe": str(path), "steps": steps.plan(), "output": str(output), "seed": seed}
    say(plan_table(plan))
    if dry_run:
        if as_json:
            options.print_json({"schema_version": "1.0", "plan": plan})
        return
    report = worker.run(f"compressing {ref.name}", "deploytool.compress.run:compress_job", limits, say,
                        ref=asdict(ref), recipe_path=str(path.absolute()), out=str(output.absolute()), seed=seed,
                        evaluate=not no_quality, overwrite=overwrite)  # fmt: skip
    if not first:
        return
    if as_json:
        options.print_json(report)
    else:
        click.echo("\n".join(_lines(report, output)))


def _explained(told: dict[str, Any]) -> list[str]:
    lines = []
    for step in told["explained"]:
        ran = [f"step {number} ({told['explained'][number - 1]['step']})" for number in step["without"]]
        lines.append(f"{step['step']}: {'tried on a copy' if step['tried'] else 'as its settings say'}"
                     + (f", as if {' and '.join(ran)} had not run" if ran else ""))  # fmt: skip
        lines += [f"  {sentence}" for sentence in step["effect"]]
        for name in ("parameters", "nonzeros", "size_bytes") if step["after"] else ():
            before, after = step["before"][name], step["after"][name]
            lines.append(f"  {name:<12} {before:>12} -> {after:>12}  ({after / max(before, 1):.3f}x)")
        lines += [f"  would change {name}" for name in step["layers"]]
        lines += [f"  would leave {row['layer'] or 'the module itself'}: {row['reason']}" for row in step["skipped"]]
    return lines


def _lines(report: dict[str, Any], output: Path) -> list[str]:
    before, after = report["before"], report["after"]
    lines = [_step_line(step) for step in report["steps"]]
    for name in ("parameters", "nonzeros", "size_bytes"):
        lines.append(f"{name:<12} {before[name]:>12} -> {after[name]:>12}  ({after[name] / max(before[name], 1):.3f}x)")
    stored = report["stored_bytes"]
    lines.append(f"{'stored':<12} {stored:>28}  ({stored / max(before['size_bytes'], 1):.3f}x of size_bytes before; "
                 "zeros and equal bytes take little room in the file)")  # fmt: skip
    for name, value in before["metrics"].items():
        lines.append(f"{name:<12} {value:>12.6g} -> {after['metrics'][name]:>12.6g}")
    return [*lines, f"written: {output}"]


def _step_line(step: dict[str, Any]) -> str:
    """What the model was after a step: each step's figures stand beside the one before."""
    after = step["after"]
    figures = [f"{after['parameters']} parameters", f"{after['nonzeros']} not zero"]
    figures += [f"{name} {value:.6g}" for name, value in after["metrics"].items()]
    return f"{step['step']}: {step['seconds']:.1f} s, {', '.join(figures)}"

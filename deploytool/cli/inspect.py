"""deploytool inspect"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from deploytool.artifact import MANIFEST, Artifact
from deploytool.cli import options
from deploytool.errors import IntegrityBroken, counted
from deploytool.worker import Limits


@click.command("inspect")
@click.argument("thing", required=False)
@options.limits_options
@options.json_option
def command(thing: str | None, limits: Limits, as_json: bool) -> int:
    """Show what THING holds: a model (name, file, folder), an artifact, an export's output, or a bundle.

    Exit code 6: a file of an artifact is not the one that its manifest names.
    """
    name = options.model_or_default(thing, options.say(False))
    found = _artifacts(Path(name)) if Path(name).exists() else None
    if found is None:
        found = _model(name, limits)
    if as_json:
        options.print_json({"schema_version": "1.0", **found})
    else:
        click.echo("\n".join(_text(found)))
    return IntegrityBroken.exit_code if any(a["findings"] for a in found.get("artifacts", ())) else 0


def _artifacts(path: Path) -> dict[str, Any] | None:
    """What lies at a path, or None when that is a model rather than something that deploytool made of one."""
    from deploytool.bundle.contents import opened
    from deploytool.bundle.manifest import MANIFEST as BUNDLE
    from deploytool.bundle.manifest import VARIANTS, read_manifest

    if path.suffix in (".py", ".onnx") or not (
        path.is_file() or (path / BUNDLE).is_file() or (path / MANIFEST).is_file() or any(path.glob(f"*/{MANIFEST}"))
    ):
        return None
    with opened(path) as artifacts:
        # A tar's content is there only while it is looked at: its folders are told as they are named in it.
        rows = [{**a.to_json(), "name": name, "findings": _damage(a),
                 "folder": f"{VARIANTS}/{a.folder.name}" if path.is_file() else str(a.folder)}
                for name, a in artifacts.items()]  # fmt: skip
        bundle = None
        if path.is_file() or (path / BUNDLE).is_file():
            root = next(iter(artifacts.values())).folder.parents[1]
            manifest = read_manifest((root / BUNDLE).read_bytes(), str(path))
            bundle = {"name": manifest.name, "version": manifest.version}
    return {"kind": "artifacts", "bundle": bundle, "artifacts": rows}


def _damage(artifact: Artifact) -> list[str]:
    """What is wrong with the files of an artifact, one sentence each."""
    try:
        artifact.check()
    except IntegrityBroken as error:
        return [f"damaged: {line}" for line in error.detail or (error.message,)]
    return []


def _model(name: str, limits: Limits) -> dict[str, Any]:
    from deploytool import worker
    from deploytool.load.resolve import resolve

    ref = resolve(name)
    about: dict[str, Any] = worker.run(f"inspecting {ref.name}", "deploytool.load.describe:describe_job", limits,
                                       ref=asdict(ref))  # fmt: skip
    return {"kind": "model", "model": asdict(ref), **about}


def _text(found: dict[str, Any]) -> list[str]:
    if found["kind"] == "artifacts":
        lines = [f"bundle {found['bundle']['name']} {found['bundle']['version']}"] if found["bundle"] else []
        lines += [line for artifact in found["artifacts"] for line in _artifact_text(artifact)]
        return lines + [f"{a['name']}: {finding}" for a in found["artifacts"] for finding in a["findings"]]
    lines = [f"model {found['model']['name']} ({found['model']['kind']})"]
    lines += _signature_text(found["signature"])
    lines += [f"{counted(found['parameters'], 'parameter')}, {found['size_bytes']} bytes, "
              f"{counted(found['samples'], 'sample')}",
              f"hooks: {', '.join(found['hooks']) or 'none'}"]  # fmt: skip
    for layer in found["layers"]:
        lines.append(f"  {layer['name']:<48} {layer['kind']:<14} {layer['shape']!s:<16} {_layer_text(layer)}")
    return lines


def _layer_text(layer: dict[str, Any]) -> str:
    said = [f"{layer['size_bytes']} B", *([f"{layer['bits']} bits"] if layer["bits"] else [])]
    said += [f"{layer['sparsity']:.1%} zeros"] if layer["sparsity"] else []
    said += [f"rank {layer['rank']}"] if layer["rank"] else []
    said += [f"{layer['heads']} heads"] if layer["heads"] else []
    return ", ".join(said + ([f"tied to {layer['tied_to']}"] if layer["tied_to"] else []))


def _signature_text(signature: dict[str, Any]) -> list[str]:
    return [
        f"  {side[:-1]:<7}{spec['name']}: {spec['dtype']}[{', '.join(map(str, spec['shape']))}]"
        for side in ("inputs", "outputs")
        for spec in signature[side]
    ]


def _ran_text(ran: dict[str, Any] | None) -> list[str]:
    """What the engine really runs, as its own library told when it was verified."""
    if not ran:
        return []
    if "unknown" in ran:
        return [f"  ran    not known: {ran['unknown']}"]
    lines = [f"  ran    {ran['nodes']} nodes ({_shares(ran['nodes_by_precision'])}), {ran['fused']:.0%} fused, "
             f"told by {ran['source']}"]  # fmt: skip
    if ran["compute_by_precision"]:
        lines.append(f"         {ran['flops']} flops ({_shares(ran['compute_by_precision'])})")
    if ran["delegated"]:
        lines.append(f"         delegated: {_shares(ran['delegated'])}")
    return lines + ([f"         not counted: {', '.join(ran['uncounted'])}"] if ran["uncounted"] else [])


def _shares(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {share:.0%}" for name, share in sorted(shares.items(), key=lambda item: -item[1]))


def _artifact_text(artifact: dict[str, Any]) -> list[str]:
    runs = "" if artifact["executes"] else ", built for hardware that is not here"
    lines = [f"{artifact['name']}: {artifact['format']} {artifact['precision']} for {artifact['backend']}{runs}"]
    lines += _signature_text(artifact["signature"])
    lines += _ran_text(artifact["settings"].get("ran"))
    lines += [f"  {step['name']}: {step['seconds']:.1f} s, {step['versions']}" for step in artifact["history"]]
    return lines + [f"  {f['size']:>12} B  {f['path']}" for f in artifact["files"]]

"""deploytool bundle verify | selftest | unpack"""

from __future__ import annotations

from pathlib import Path

import click

from deploytool.cli import options
from deploytool.errors import counted

_path = click.argument("bundle", type=click.Path(exists=True, path_type=Path))


@click.group("bundle")
def command() -> None:
    """Verify, self-test or unpack a bundle."""


@command.command("verify")
@_path
@options.json_option
def verify(bundle: Path, as_json: bool) -> None:
    """Check a bundle's structure and every file's checksum."""
    from deploytool.bundle.verify import verify_bundle

    manifest = verify_bundle(bundle)
    if as_json:
        options.print_json({"schema_version": "1.0", "status": "ok", "manifest": manifest.model_dump(mode="json")})
    else:
        targets = ", ".join(v.target for v in manifest.variants)
        click.echo(f"ok: {manifest.name} {manifest.version} ({targets}), {counted(len(manifest.files), 'file')}")


@command.command("selftest")
@_path
@click.option("--variant", default=None, help="Only this target's variant.")
@click.option("--timeout", default=600.0, type=options.SECONDS, show_default=True, help="Seconds that it may take.")
@click.option("--trust", is_flag=True, help="Run the bundle's own script even when it is not the shipped one.")
@options.json_option
def selftest(bundle: Path, variant: str | None, timeout: float, trust: bool, as_json: bool) -> None:
    """Replay the bundle's golden cases here, as the device would."""
    from deploytool.bundle.trial import selftest as run

    result = run(bundle, variant, timeout=timeout, trust=trust)
    if as_json:
        options.print_json(result)
        return
    for tested in result["variants"]:
        cases = counted(len(tested["cases"]), "case")
        click.echo(f"{tested['target']}: {tested['status']} ({cases}) {tested['reason']}".rstrip())


@command.command("unpack")
@_path
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@options.overwrite_option
def unpack(bundle: Path, output: Path, overwrite: bool) -> None:
    """Verify a bundle and write its content to a folder."""
    from deploytool.bundle.verify import unpack as run

    run(bundle, output, overwrite=overwrite)
    click.echo(str(output))

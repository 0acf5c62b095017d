"""deploytool package"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploytool.artifact import Artifact
from deploytool.cli import options
from deploytool.errors import InputRefused, counted

if TYPE_CHECKING:
    from deploytool.bundle.manifest import Bucket


class BucketType(click.ParamType):  # type: ignore[type-arg]
    """Sizes and the target that takes them: batch=1,sequence=64:ort-int8."""

    name = "bucket"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[dict[str, int], str]:
        sizes, mark, target = str(value).rpartition(":")
        if not mark or not target:
            self.fail(f"{value!r} must be sizes and a target, such as batch=1,sequence=64:ort-int8", param, ctx)
        return options.SIZES.convert(sizes, param, ctx), target


@click.command("package")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle: a folder or a tar.")
@click.option("--format", "kind", type=click.Choice(["dir", "tar"]), default=None,
              help="Default: tar when the output ends in .tar, else dir.")  # fmt: skip
@click.option("--name", default=None, help="The bundle's name; default: the model's.")
@click.option("--version", "version", default="0.1.0", show_default=True, help="The bundle's version.")
@click.option("--bucket", "buckets", multiple=True, type=BucketType(), metavar="SIZES:TARGET",
              help="Feeds up to batch=1,sequence=64 go to TARGET's artifact; repeat it.")  # fmt: skip
@options.overwrite_option
@options.json_option
def command(
    artifacts: tuple[Path, ...], output: Path, kind: str | None, name: str | None, version: str,
    buckets: tuple[tuple[dict[str, int], str], ...], overwrite: bool, as_json: bool,
) -> None:  # fmt: skip
    """Put ARTIFACTS (folders, or an export's whole output) into one bundle, with checksums and a self-test."""
    from deploytool.bundle.contents import opened
    from deploytool.bundle.manifest import Bucket
    from deploytool.bundle.pack import pack

    table = [Bucket(sizes=sizes, target=target) for sizes, target in buckets] or _table(artifacts)
    with ExitStack() as stack:
        variants = [a for path in artifacts for a in _packable(path, stack.enter_context(opened(path)))]
        form = kind or ("tar" if output.suffix == ".tar" else "dir")
        manifest = pack(variants, output, name=name or str(variants[0].model["name"]), version=version,
                        kind="tar" if form == "tar" else "dir", overwrite=overwrite, buckets=table)  # fmt: skip
    if as_json:
        options.print_json({"schema_version": "1.0", "bundle": str(output), "format": form,
                            "manifest": manifest.model_dump(mode="json")})  # fmt: skip
        return
    click.echo(f"{output}: {manifest.name} {manifest.version}, {counted(len(manifest.variants), 'variant')}, "
               f"{counted(len(manifest.files), 'file')}")  # fmt: skip
    for artifact in variants:
        click.echo(f"  {artifact.target['name']}: {artifact.precision}, {artifact.size_bytes / 1e6:.2f} MB, of "
                   f"{artifact.folder.resolve()}")  # fmt: skip
    for bucket in manifest.buckets or ():
        click.echo(f"  up to {', '.join(f'{dim}={size}' for dim, size in bucket.sizes.items())}: {bucket.target}")
    click.echo(f"next: deploytool bundle selftest {output}")


def _table(paths: tuple[Path, ...]) -> list[Bucket]:
    """The table of the bundle that is packed again; of several things none is known, and that is said."""
    from deploytool.bundle.manifest import MANIFEST
    from deploytool.bundle.verify import verify_bundle

    tables = {p: verify_bundle(p).buckets or () for p in paths if p.is_file() or (p / MANIFEST).is_file()}
    if len(paths) == 1:
        return [bucket for table in tables.values() for bucket in table]
    for path in [path for path, table in tables.items() if table]:
        click.echo(f"{path}: its table of buckets is left out; name buckets by --bucket", err=True)
    return []


def _packable(path: Path, found: dict[str, Artifact]) -> list[Artifact]:
    """Of an export's whole output what can be packed, the rest being said; an artifact that was named is taken."""
    from deploytool.bundle.contents import left_over
    from deploytool.bundle.pack import SOURCE

    older, stale = left_over(path, found)
    if stale:
        raise InputRefused("DT311", f"what is packed of {path} must be of its last export (got left-overs: "
                           f"{', '.join(sorted(stale))})", detail=[f"{name}: {why}" for name, why in stale.items()],
                           fix="export them again, remove them, or name the artifacts to pack")  # fmt: skip
    for name in older:
        click.echo(f"{path}: {name} is packed too: an earlier export made it, from the same model", err=True)
    engines = [artifact for artifact in found.values() if artifact.format != SOURCE]
    if len(found) == 1 or not engines:
        return list(found.values())
    for name, artifact in found.items():
        if artifact.format == SOURCE:
            click.echo(f"{path}: {name} is left out: it holds no engine, only where its model lay", err=True)
    return engines

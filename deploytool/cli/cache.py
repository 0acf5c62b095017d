"""deploytool cache list|clear"""

from __future__ import annotations

import time
from dataclasses import asdict

import click

from deploytool.cli import options
from deploytool.errors import counted


@click.group("cache")
def command() -> None:
    """Show or empty the folder where lowered models are kept between runs."""


@command.command("list")
@options.json_option
def list_entries(as_json: bool) -> None:
    """List what is kept, oldest use first, with its size."""
    from deploytool.cache import entries
    from deploytool.worker import cache_folder

    found = entries()
    total = sum(entry.size_bytes for entry in found)
    if as_json:
        options.print_json({"schema_version": "1.0", "folder": str(cache_folder()), "size_bytes": total,
                            "entries": [asdict(entry) for entry in found]})  # fmt: skip
        return
    for entry in found:
        days = (time.time() - entry.used_unix_seconds) / 86_400
        click.echo(f"{entry.name}  {entry.model:<24} {entry.size_bytes / 1e6:>9.1f} MB  used {days:.1f} days ago")
    click.echo(f"{counted(len(found), 'entry')}, {total / 1e6:.1f} MB, in {cache_folder()}")


@command.command("clear")
@click.option("--older-than", default=0.0, type=options.DAYS, metavar="DAYS",
              help="Only what was not used for so many days.")  # fmt: skip
@options.dry_run_option
@options.json_option
def clear(older_than: float, dry_run: bool, as_json: bool) -> None:
    """Remove what is kept, but for entries of the last hour, which another run may be reading."""
    from deploytool.cache import drop, entries

    unused = [entry for entry in entries() if time.time() - entry.used_unix_seconds > max(older_than * 86_400, 3600.0)]
    freed = sum(entry.size_bytes for entry in unused)
    if not dry_run:
        drop(unused)
    if as_json:
        options.print_json({"schema_version": "1.0", "removed": [entry.name for entry in unused], "freed_bytes": freed,
                            "dry_run": dry_run})  # fmt: skip
        return
    click.echo(f"{'would remove' if dry_run else 'removed'} {counted(len(unused), 'entry')}, {freed / 1e6:.1f} MB")

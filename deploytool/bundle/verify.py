"""Checks a bundle without trusting it: form first, then every checksum, then what the manifest says of the files."""

from __future__ import annotations

import json
from pathlib import Path

from deploytool import artifact as artifacts
from deploytool.artifact import Artifact
from deploytool.bundle.manifest import (
    MANIFEST,
    MANIFEST_LIMIT_BYTES,
    SELFTEST,
    SUMS,
    VARIANTS,
    Manifest,
    Variant,
    read_manifest,
    read_sums,
)
from deploytool.bundle.store import Store, digest, open_store, read
from deploytool.errors import InputRefused, IntegrityBroken
from deploytool.storage import new_folder, refuse_existing


def verify_bundle(path: Path) -> Manifest:
    """Check a bundle (folder or tar) and return its manifest.

    Raises IntegrityBroken naming the files that are changed, missing or added, InputRefused for anything malformed
    or unsafe.
    """
    with open_store(path) as store:
        return verify_store(store)


def unpack(path: Path, out: Path, *, overwrite: bool = False) -> Manifest:
    """Check a bundle, then write its files to the folder `out`, which appears whole or not at all."""
    refuse_existing(out, overwrite, MANIFEST)
    with open_store(path) as store:
        manifest = verify_store(store)
        with new_folder(out, overwrite=overwrite, marker=MANIFEST) as folder:
            for name in store.sizes:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    for chunk in store.chunks(name):
                        file.write(chunk)
            (folder / SELFTEST).chmod(0o755)
            verify_bundle(folder)  # what was written is what was checked
    return manifest


def verify_store(store: Store) -> Manifest:
    """The checks of `verify_bundle` on opened files."""
    if MANIFEST not in store.sizes:
        raise InputRefused("DT311", f"a bundle must hold {MANIFEST} (got {store.where})",
                           fix="name a bundle that `deploytool package` wrote")  # fmt: skip
    sums = read_sums(read(store, SUMS, MANIFEST_LIMIT_BYTES), store.where)
    _check_sums(store, sums)
    manifest = read_manifest(read(store, MANIFEST, MANIFEST_LIMIT_BYTES), store.where)
    _check_files(store, manifest, sums)
    for variant in manifest.variants:
        _check_variant(store, manifest, variant)
    return manifest


def _check_sums(store: Store, sums: dict[str, str]) -> None:
    problems = [f"missing: {name}" for name in sums if name not in store.sizes]
    problems += [f"added: {name}" for name in store.sizes if name not in sums and name != SUMS]
    if not problems:  # hashing takes long; what is missing or added is known before
        problems = [f"changed: {name}" for name, sha in sums.items() if digest(store, name) != sha]
    if problems:
        raise IntegrityBroken("DT601", f"{store.where} must hold the files of {SUMS}, unchanged", detail=problems,
                              fix="get the bundle again, from whoever released it")  # fmt: skip


def _check_files(store: Store, manifest: Manifest, sums: dict[str, str]) -> None:
    known = {file.path: file for file in manifest.files}
    expected = sums.keys() - {MANIFEST}
    problems = [f"not there: {name}" for name in known if name not in expected]
    problems += [f"not in {MANIFEST}: {name}" for name in expected if name not in known]
    problems += [f"changed: {name}" for name, file in known.items()
                 if name in expected and (file.sha256 != sums[name] or file.size != store.sizes[name])]  # fmt: skip
    if len(known) != len(manifest.files):
        problems.append("a file is named twice")
    if problems:
        raise IntegrityBroken("DT601", f"{store.where} must hold the files of {MANIFEST}, unchanged",
                              detail=sorted(problems))  # fmt: skip
    folders = {f"{VARIANTS}/{variant.target}" for variant in manifest.variants}
    strangers = [name for name in known if name != SELFTEST and "/".join(name.split("/")[:2]) not in folders]
    if strangers or SELFTEST not in known:
        raise InputRefused("DT311", f"{store.where} must hold {SELFTEST} and one folder per variant",
                           detail=[f"belongs to no variant: {name}" for name in strangers])  # fmt: skip


def _check_variant(store: Store, manifest: Manifest, variant: Variant) -> None:
    """The variant's own artifact.json must agree with the bundle's manifest and with the files."""
    artifact = read_artifact(store, variant.target)
    said = (artifact.backend, artifact.format, artifact.entry, artifact.precision, artifact.executes,
            artifact.signature.to_json(), dict(artifact.target).get("name"))  # fmt: skip
    listed = (variant.backend, variant.format, variant.entry, variant.precision, variant.executes,
              variant.signature, variant.target)  # fmt: skip
    if said != listed:
        raise InputRefused("DT311", f"{store.where}: variant {variant.target!r} must be what its {artifacts.MANIFEST} "
                                    f"says", detail=[f"{a!r} is not {b!r}" for a, b in zip(said, listed, strict=True)
                                                     if a != b])  # fmt: skip
    prefix = f"{VARIANTS}/{variant.target}/"
    here = {f.path.removeprefix(prefix): (f.size, f.sha256) for f in manifest.files if f.path.startswith(prefix)}
    own = {f.path: (f.size, f.sha256) for f in artifact.files}
    extra = here.keys() - own.keys() - {artifacts.MANIFEST, artifacts.REPORT}
    wrong = sorted(extra | {name for name, entry in own.items() if here.get(name) != entry})
    if wrong or artifact.entry not in own:
        raise IntegrityBroken("DT601", f"{store.where}: variant {variant.target!r} must hold the files of its "
                                       f"{artifacts.MANIFEST}",
                              detail=wrong or [f"missing: {artifact.entry}"])  # fmt: skip


def read_artifact(store: Store, target: str) -> Artifact:
    """The artifact of a variant, its folder being where it lies in the bundle."""
    name = f"{VARIANTS}/{target}/{artifacts.MANIFEST}"
    try:
        data = json.loads(read(store, name, MANIFEST_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputRefused("DT311", f"{store.where}: {name} must be JSON (got: {error!r})") from error
    return Artifact.from_json(Path(store.where) / VARIANTS / target, data)

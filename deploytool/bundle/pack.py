"""Packs artifacts into a bundle: a folder or a tar that carries its own proof and its own self-test."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from deploytool import artifact as artifacts
from deploytool.artifact import GOLDEN, Artifact
from deploytool.bundle.archive import Member, write_tar
from deploytool.bundle.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    SELFTEST,
    SUMS,
    VARIANTS,
    Bucket,
    File,
    Manifest,
    Tolerance,
    Variant,
    ordered,
    write_sums,
    wrong_buckets,
)
from deploytool.bundle.names import LABEL, check_names
from deploytool.bundle.verify import verify_bundle
from deploytool.errors import CheckFailed, InputRefused, IntegrityBroken, UsageProblem
from deploytool.storage import new_file, new_folder, read_json, refuse_existing, sha256_file

Content = Path | bytes
SOURCE = "source"  # the format of an artifact that is no engine: it names the model and loads it again
TEMPLATE = Path(__file__).with_name("selftest.py")

_CHUNK = 1 << 20
_ASSETS = (".json", ".txt", ".md", ".model", ".toml")
# The engine that was recorded is the engine that is replayed, so the outputs differ by the order of sums only;
# int8 kernels of another CPU round elsewhere, fp16 has 11 bits and bf16 has 8.
_TOLERANCES = {
    "fp32": Tolerance(cosine_min=0.9999, relative_error_max=0.015, agreement_min=1.0),
    "fp16": Tolerance(cosine_min=0.999, relative_error_max=0.05, agreement_min=0.99),
    "bf16": Tolerance(cosine_min=0.998, relative_error_max=0.07, agreement_min=0.98),
    "int8": Tolerance(cosine_min=0.99, relative_error_max=0.15, agreement_min=0.95),
}


def pack(
    variants: Sequence[Artifact], out: Path, *, name: str, version: str, kind: Literal["dir", "tar"] = "dir",
    overwrite: bool = False, buckets: Sequence[Bucket] = (),
) -> Manifest:  # fmt: skip
    """Write a bundle of one model's artifacts to `out` and return its manifest; equal inputs give equal bytes.

    An artifact is taken only when its files are unchanged, golden cases lie in it, and its own report says that it
    passed. Its `artifact.json` is packed without the place where the model lay, and `report.json` with the digest of
    what was packed. `buckets` say which artifact takes feeds of which sizes. The bundle is verified before it gets its
    name. Raises IntegrityBroken, CheckFailed, InputRefused or UsageProblem (the output exists and is no bundle, or may
    not be overwritten; the table does not fit).
    """
    _check_labels(name, version)
    refuse_existing(out, overwrite, MANIFEST if kind == "dir" or out.is_dir() else None)
    contents = _contents(variants)
    manifest = _manifest(variants, contents, name, version, buckets)
    contents[MANIFEST] = manifest.to_bytes()
    contents[SUMS] = write_sums({**{f.path: f.sha256 for f in manifest.files}, MANIFEST: _sha256(contents[MANIFEST])})
    check_names(contents, str(out))
    if kind == "dir":
        with new_folder(out, overwrite=overwrite, marker=MANIFEST) as folder:
            _write_folder(folder, contents)
            return verify_bundle(folder)
    with new_file(out) as file:
        write_tar(file, _members(contents, f"{name}-{version}"))
        file.flush()
        return verify_bundle(Path(file.name))


def _check_labels(name: str, version: str) -> None:
    for what, text in (("name", name), ("version", version)):
        if not re.fullmatch(LABEL, text):
            raise UsageProblem("DT201", f"a bundle's {what} must be 1 to 64 letters, digits, dots, dashes or "
                                        f"underscores (got {text!r})")  # fmt: skip


def _contents(variants: Sequence[Artifact]) -> dict[str, Content]:
    contents: dict[str, Content] = {SELFTEST: TEMPLATE}
    if not variants:
        raise UsageProblem("DT201", "a bundle must hold at least one artifact (got none)")
    model = _model(variants[0])
    for artifact in variants:
        target = _target(artifact)
        _check_fit(artifact)
        if _model(artifact) != model:
            raise InputRefused("DT311", f"a bundle must hold artifacts of one model (that of {target!r} was exported "
                                        "from another, or before the model changed)",
                               detail=[f"{_target(variants[0])}: {model}", f"{target}: {_model(artifact)}"],
                               fix="export all of them again, or name the artifacts to pack")  # fmt: skip
        prefix = f"{VARIANTS}/{target}"
        if f"{prefix}/{artifacts.MANIFEST}" in contents:
            raise UsageProblem("DT201", f"a bundle must hold one artifact per target (got two for {target!r})")
        contents.update({f"{prefix}/{f.path}": artifact.folder / f.path for f in artifact.files})
        contents.update({f"{prefix}/{name}": text for name, text in _papers(artifact).items()})
    return contents


def _papers(artifact: Artifact) -> dict[str, bytes]:
    """The artifact's manifest without the place where its model lay, and its report, which names the new manifest."""
    manifest = {**read_json(artifact.folder / artifacts.MANIFEST), "model": _model(artifact)}
    text = _json(manifest)
    report = {**read_json(artifact.folder / artifacts.REPORT), "artifact_digest": _sha256(text)}
    return {artifacts.MANIFEST: text, artifacts.REPORT: _json(report)}


def _json(data: Any) -> bytes:
    try:
        return (json.dumps(data, indent=2, allow_nan=False) + "\n").encode()
    except ValueError as error:
        raise InputRefused("DT309", f"what an export wrote must be JSON (got: {error})",
                           fix="export it again") from error  # fmt: skip


def _check_fit(artifact: Artifact) -> None:
    """Only what was proved is packed, and only what runs where its source is not."""
    if artifact.format == SOURCE:
        raise InputRefused("DT311", f"a bundle must hold engines (got {artifact.folder}, which only says where its "
                                    f"model lay)", fix="pack another target's artifact")  # fmt: skip
    artifact.check()
    report = artifact.folder / artifacts.REPORT
    if not report.is_file():
        raise InputRefused("DT309", f"an artifact must hold its {artifacts.REPORT} (got {artifact.folder} without)",
                           fix="export it again; an unverified artifact is not packed")  # fmt: skip
    try:
        said = dict(read_json(report))
    except (ValueError, TypeError) as error:
        raise InputRefused("DT309", f"{report} must be a JSON object (got: {error})") from error
    if said.get("artifact_digest") != sha256_file(artifact.folder / artifacts.MANIFEST):
        raise IntegrityBroken("DT601", f"{report} must belong to the {artifacts.MANIFEST} beside it (got another "
                                       f"digest)", fix="export it again")  # fmt: skip
    if (said.get("parity") or {}).get("passed") is not True or said.get("status") != "ok":
        raise CheckFailed("DT101", f"an artifact must have passed its export (got {artifact.folder}, which has not)",
                          detail=[str(said["reason"])] if said.get("reason") else [],
                          fix="look at its report.json, mend what failed, and export it again")  # fmt: skip
    if not any(f.path.startswith(f"{GOLDEN}/") for f in artifact.files):
        raise InputRefused("DT309", f"an artifact must hold recorded cases in {GOLDEN}/ (got {artifact.folder} "
                                    f"without)", fix="export it again")  # fmt: skip


def _target(artifact: Artifact) -> str:
    target = str(artifact.target.get("name", ""))
    if not re.fullmatch(LABEL, target):
        raise InputRefused("DT309", f"an artifact must name its target (got {target!r} in {artifact.folder})")
    return target


def _model(artifact: Artifact) -> dict[str, Any]:
    """Name and fingerprint; where it lay on the machine that built it is nobody's business."""
    return {key: artifact.model[key] for key in ("name", "fingerprint") if key in artifact.model}


def _manifest(
    variants: Sequence[Artifact], contents: Mapping[str, Content], name: str, version: str, buckets: Sequence[Bucket]
) -> Manifest:
    entries = {f"{VARIANTS}/{_target(artifact)}/{artifact.entry}" for artifact in variants}
    files = tuple(
        File(path=path, size=_size(contents[path]), sha256=_sha256(contents[path]), role=_role(path, entries))
        for path in sorted(contents)
    )
    told = tuple(sorted(map(_variant, variants), key=lambda v: v.target))
    if wrong := wrong_buckets(buckets, told):
        raise UsageProblem("DT201", "the table of buckets must fit the artifacts", detail=wrong)
    return Manifest(schema_version=SCHEMA_VERSION, name=name, version=version, created=_created(),
                    model=_model(variants[0]), files=files, variants=told,
                    buckets=ordered(buckets) or None)  # fmt: skip


def _variant(artifact: Artifact) -> Variant:
    builds = [step for step in artifact.history if step.name == "build"] or list(artifact.history)
    return Variant(
        target=_target(artifact), backend=artifact.backend, format=artifact.format, entry=artifact.entry,
        precision=artifact.precision, executes=artifact.executes, signature=artifact.signature.to_json(),
        runtime=dict(builds[-1].versions) if builds else {}, settings=dict(artifact.settings),
        device=dict(artifact.target.get("device", {})),
        tolerance=_TOLERANCES.get(artifact.precision, _TOLERANCES["int8"]),
    )  # fmt: skip


def _role(path: str, entries: set[str]) -> str:
    inner = path.split("/", 2)[-1]
    if path in entries:
        return "engine"
    if inner.startswith(f"{GOLDEN}/"):
        return "golden"
    known = {SELFTEST: "selftest", artifacts.MANIFEST: "manifest", artifacts.REPORT: "evidence"}
    return known.get(inner) or ("asset" if inner.endswith(_ASSETS) else "part")


def _created() -> str | None:
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch is None:
        return None
    if not epoch.isdecimal() or int(epoch) > 253402300799:
        raise UsageProblem("DT201", f"SOURCE_DATE_EPOCH must be seconds since 1970 (got {epoch!r})")
    return datetime.fromtimestamp(int(epoch), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _size(content: Content) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _sha256(content: Content) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else sha256_file(content)


def _chunks(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def _members(contents: Mapping[str, Content], top: str) -> Iterator[tuple[Member, Iterator[bytes]]]:
    for name in sorted(contents):
        content = contents[name]
        yield Member(f"{top}/{name}", _size(content), executable=name == SELFTEST), _chunks(content)


def _write_folder(folder: Path, contents: Mapping[str, Content]) -> None:
    for name in sorted(contents):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            for chunk in _chunks(contents[name]):
                file.write(chunk)
        target.chmod(0o755 if name == SELFTEST else 0o644)

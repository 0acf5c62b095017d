"""What `deploytool.json` of a bundle says, and what `SHA256SUMS` says."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, ValidationError

from deploytool.artifact import BUNDLE
from deploytool.bundle.names import LABEL
from deploytool.errors import InputRefused, IntegrityBroken, nearest
from deploytool.settings import Table

SCHEMA_VERSION = "1.0"
MANIFEST = BUNDLE
SUMS = "SHA256SUMS"
SELFTEST = "selftest.py"
VARIANTS = "variants"
MANIFEST_LIMIT_BYTES = 16_000_000

_SUM_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


class File(Table):
    """One file of the bundle. `role`: engine, part, asset, golden, evidence, manifest, selftest."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    role: str


class Tolerance(Table):
    """How near the self-test must come to the recorded outputs, for every sample of every output.

    cosine_min           cosine of the angle between the two
    relative_error_max   L2 norm of the difference divided by the recorded output's
    agreement_min        share of equal elements of integer outputs, 0 to 1
    """

    cosine_min: float = Field(ge=-1, le=1)
    relative_error_max: float = Field(ge=0)
    agreement_min: float = Field(ge=0, le=1)


class Variant(Table):
    """One artifact of the bundle, for one target; its files lie in `variants/TARGET/`."""

    target: str = Field(pattern=f"^{LABEL}$")
    backend: str
    format: str
    entry: str
    precision: str
    executes: bool
    signature: dict[str, Any]
    runtime: dict[str, str]
    settings: dict[str, Any]
    device: dict[str, Any]
    tolerance: Tolerance


class Bucket(Table):
    """Feeds none of whose free dimensions is larger than in `sizes` go to the variant of `target`."""

    sizes: dict[str, Annotated[int, Field(ge=1)]] = Field(min_length=1)
    target: str


class Manifest(Table):
    """The bundle. `buckets`, where there are any, say which variant takes feeds of which sizes: the first that fits.

    `created` stands there only when SOURCE_DATE_EPOCH gave it, so that equal content is equal bytes."""

    schema_version: str
    name: str = Field(pattern=f"^{LABEL}$")
    version: str = Field(pattern=f"^{LABEL}$")
    created: str | None = None
    model: dict[str, Any]
    variants: tuple[Variant, ...] = Field(min_length=1)
    buckets: tuple[Bucket, ...] | None = Field(default=None, min_length=1)
    files: tuple[File, ...] = Field(min_length=1)

    def to_bytes(self) -> bytes:
        """The manifest's file: sorted keys, UTF-8, a newline at its end."""
        data = self.model_dump(mode="json", exclude_none=True)
        return (json.dumps(data, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n").encode()


def read_manifest(data: bytes, where: str) -> Manifest:
    """Check the bytes of a manifest; raises InputRefused when it is malformed, or of a newer schema."""
    try:
        raw = json.loads(data, object_pairs_hook=_refuse_twice)
        version = str(raw["schema_version"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputRefused("DT311", f"{where}: {MANIFEST} must be a JSON object with schema_version "
                                    f"(got: {error!r})"[:500]) from error  # fmt: skip
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise InputRefused("DT311", f"{where}: {MANIFEST} must be of schema {SCHEMA_VERSION} (got {version})",
                           fix="use the deploytool that wrote it, or a newer one")  # fmt: skip
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        raise InputRefused("DT311", f"{where}: {MANIFEST} must follow schema {SCHEMA_VERSION}",
                           detail=[_describe(problem) for problem in error.errors()[:20]]) from error  # fmt: skip
    targets = [variant.target.casefold() for variant in manifest.variants]
    if len(set(targets)) != len(targets):
        raise InputRefused("DT311", f"{where}: {MANIFEST} must name each target once (got {', '.join(targets)})")
    if wrong := wrong_buckets(manifest.buckets or (), manifest.variants):
        raise InputRefused("DT311", f"{where}: the table of buckets must fit the variants", detail=wrong[:20])
    return manifest


def ordered(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The table as it is written: the bucket with the fewest elements first."""
    return tuple(sorted(buckets, key=lambda b: (math.prod(b.sizes.values()), sorted(b.sizes.items()), b.target)))


def wrong_buckets(buckets: Sequence[Bucket], variants: Sequence[Variant]) -> list[str]:
    """What is wrong with a table: sentences; none where nothing is."""
    known = {variant.target: variant for variant in variants}
    wrong = [f"{b.target!r} is no variant; {nearest(b.target, known)}" for b in buckets if b.target not in known]
    used = [known[b.target] for b in buckets if b.target in known]
    wrong += [f"{v.target!r} was built for a device that is not here" for v in used if not v.executes]
    if any(v.signature != used[0].signature for v in used):
        wrong.append("the variants must have the same inputs and outputs")
    try:
        free = {d for v in used for spec in v.signature["inputs"] for d in spec["shape"] if isinstance(d, str)}
    except (KeyError, TypeError):
        return [*wrong, "the variants must have inputs with shapes"]
    wrong += [f"{dim!r} is no free dimension; {nearest(dim, free)}" for b in buckets for dim in b.sizes
              if dim not in free]  # fmt: skip
    if any(b.sizes.keys() != buckets[0].sizes.keys() for b in buckets):
        wrong.append("every bucket must have sizes of the same dimensions")
    seen = [tuple(sorted(b.sizes.items())) for b in buckets]
    if len(set(seen)) < len(seen):
        wrong.append("no two buckets may have the same sizes")
    return wrong


def write_sums(sums: Mapping[str, str]) -> bytes:
    """The text that `sha256sum -c` reads: sorted by name, two spaces, LF."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def read_sums(data: bytes, where: str) -> dict[str, str]:
    """Checksums by name. A damaged list is IntegrityBroken: nothing else can be trusted then."""
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode(errors="replace").split("\n")[:-1], start=1):
        match = _SUM_LINE.fullmatch(line)
        if match is None:
            raise IntegrityBroken("DT601", f"{where}: {SUMS} must hold checksums (line {number} does not)")
        sums[match[2]] = match[1]
    if not sums or write_sums(sums) != data:
        raise IntegrityBroken("DT601", f"{where}: {SUMS} must be sorted, name each file once and end in a newline")
    return sums


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        table = Variant if problem["loc"][0] == "variants" and len(problem["loc"]) == 3 else Manifest
        return f"unknown key {name!r}; {nearest(str(problem['loc'][-1]), table.model_fields)}"
    return f"{name!r}: {problem['msg']}"


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    if len(set(keys)) != len(keys):
        raise ValueError("a key stands twice")
    return dict(pairs)

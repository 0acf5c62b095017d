"""Reads what `--json` of export, compress, verify and check printed, and refuses everything else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploytool.errors import InputRefused
from deploytool.report.compression import compression_page
from deploytool.report.rows import Page, check_page, export_page
from deploytool.results import SCHEMA_VERSION, Finding, Verdict
from deploytool.storage import read_json


@dataclass(frozen=True)
class Document:
    """A results document and the page that shows it."""

    data: Mapping[str, Any]
    page: Page


def read_document(file: Path) -> Document:
    """A report (of an export, of one artifact, of a compression) or a verdict; InputRefused for anything else."""
    try:
        data = read_json(file)
        json.dumps(data, allow_nan=False, ensure_ascii=False).encode()  # no NaN, no half characters
        return _document(data)
    # A document of strangers may be wrong anywhere: whatever its rows cannot be made of is refused.
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ArithmeticError, RecursionError) as error:
        raise InputRefused("DT309", f"{file} must be a report or a verdict in JSON, schema {SCHEMA_VERSION} "
                                    f"(got: {error!r:.200})",
                           fix="name what export, compress, verify or check wrote") from error  # fmt: skip


def _document(data: Any) -> Document:
    if str(data["schema_version"]).split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise ValueError(f"schema_version {data['schema_version']}")
    if "targets" in data or "target" in data:
        report = data if "targets" in data else {**data, "targets": [data]}
        if not isinstance(report["targets"], list) or not report["targets"]:
            raise TypeError("targets must be a list of at least one result")
        if not all(isinstance(target[key], str) for target in report["targets"] for key in ("target", "status")):
            raise TypeError("target and status must be text")
        return Document(report, export_page(report))
    compression = data["report"] if "weights_sha256" in data else data  # a folder keeps it beside its weights' names
    if "steps" in compression:
        return Document(compression, compression_page(compression))
    verdict = Verdict(tuple(Finding(**finding) for finding in data["findings"]))
    page = check_page(verdict)
    if data["status"] != verdict.status:
        raise ValueError(f"status {data['status']!r} does not follow from the findings")
    return Document(data, page)

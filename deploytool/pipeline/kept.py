"""Parity figures kept with a prepared model: the very same bytes are not verified twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploytool.artifact import GOLDEN, Artifact, versions
from deploytool.backends.base import find_backend
from deploytool.bench.environment import environment
from deploytool.cache import Prepared
from deploytool.storage import new_folder, read_json, write_json
from deploytool.worker import Worker


def parity_of(
    prepared: Prepared, artifact: Artifact, engine: Callable[[], Worker], *, ships: bool = True
) -> tuple[dict[str, Any], Path]:
    """An artifact's figures on the prepared cases, and the folder of golden cases that goes with them.

    They are computed in `engine()` unless they were before for the same files, settings, libraries and processor. The
    cases are part of the prepared model, which is made anew when anything that they follow from changes. A graph that
    never `ships` is shown right on all but the largest case, and has no golden ones: every target that is made of it
    is judged on all of them.
    """
    kept = prepared.folder / "verified" / (_identity(prepared, artifact) + ("" if ships else "-graph"))
    if not (kept / "parity.json").is_file():
        with new_folder(kept, overwrite=True) as folder:
            golden = str(folder / GOLDEN) if ships else None
            figures = engine().call("deploytool.verify.parity:parity_job", artifact=str(artifact.folder), golden=golden,
                                    cases=str(prepared.folder / "cases"), largest=ships)  # fmt: skip
            write_json(folder / "parity.json", figures)
    found: dict[str, Any] = read_json(kept / "parity.json")
    return found, kept / GOLDEN


def _identity(prepared: Prepared, artifact: Artifact) -> str:
    """A digest of all that an engine's outputs follow from, but for the cases; assets such as tokenizers are not."""
    assets = {path.name for path in (prepared.folder / "assets").iterdir()}
    files = [[f.path, f.sha256] for f in artifact.files if not f.path.startswith(f"{GOLDEN}/") and f.path not in assets]
    libraries = versions(find_backend(artifact.backend).packages)
    about = [files, dict(artifact.settings), artifact.entry, libraries, environment()["cpu_flags"]]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]

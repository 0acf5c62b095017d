"""One model's reference: its prepared folder, its eager artifact, its own figures, each made once when first needed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact, versions
from deploytool.backends.base import find_backend
from deploytool.bench.environment import environment
from deploytool.cache import Prepared
from deploytool.cases import case_files
from deploytool.signature import Signature
from deploytool.source import ModelRef
from deploytool.storage import new_folder, read_json, write_json
from deploytool.target import Target, load_target
from deploytool.verify.judge import compare_quality


class Reference:
    """What artifacts of one model are built from and measured against. `work` holds what is dropped afterwards."""

    def __init__(self, ref: ModelRef, prepared: Prepared, work: Path, limits: worker.Limits, seed: int,
                 use_cache: bool = True):  # fmt: skip
        self.ref = ref
        self.prepared = prepared
        self._work = work
        self._limits = limits
        self._seed = seed
        self._use_cache = use_cache
        self._made: dict[str, Artifact] = {}

    @property
    def original(self) -> ModelRef:
        """The model that quality and speed are measured against: the uncompressed one."""
        original = self.prepared.info["original"]
        return ModelRef(**original) if original else self.ref

    @property
    def signature(self) -> Signature:
        """The model's signature."""
        return Signature.from_json(read_json(self.prepared.folder / "signature.json"))

    @property
    def cases(self) -> list[Path]:
        """Recorded cases; the first is the one that is timed."""
        return case_files(self.prepared.folder / "cases")

    def build(self, target: Target, out: Path) -> Artifact:
        """Build a target of the model into the empty folder `out`."""
        return self._build(target, self.ref, out)

    def _build(self, target: Target, ref: ModelRef, out: Path) -> Artifact:
        worker.run(f"building {target.name}", "deploytool.backends.build:build_job", self._limits,
                   target=target.to_json(), prepared=str(self.prepared.folder), ref=asdict(ref),
                   fingerprint=self.prepared.fingerprint, out=str(out), seed=self._seed)  # fmt: skip
        return Artifact.load(out, check=False)  # written a moment ago, by us

    def eager(self) -> Artifact:
        """The eager artifact of the uncompressed model."""
        return self._once("eager", self.original)

    def plain(self, name: str, done: Sequence[Mapping[str, Any]]) -> Artifact:
        """The artifact of the plain target `name`: the one exported in this run, else one built for the purpose."""
        for result in done:
            if result["target"] == name and result["status"] == "ok":
                return Artifact.load(Path(result["artifact"]), check=False)
        return self._once(name, self.ref)

    def _once(self, name: str, ref: ModelRef) -> Artifact:
        if name not in self._made:
            folder = self._work / name
            folder.mkdir()
            self._made[name] = self._build(load_target(name), ref, folder)
        return self._made[name]

    def parity(self, artifact: Artifact, *, golden: bool = False) -> dict[str, Any]:
        """The artifact's outputs against the recorded ones; with `golden`, cases are kept in its folder.

        The very same bytes, on the same cases, libraries and processor, are not run twice: figures and golden cases
        are kept with the prepared model, unless the cache is not to be used.
        """
        kept = self.prepared.folder / "verified" / self._identity(artifact)
        if not (golden and self._use_cache):
            return self._parity(artifact, artifact.folder / GOLDEN if golden else None)
        if not (kept / "parity.json").is_file():
            with new_folder(kept, overwrite=True) as folder:
                write_json(folder / "parity.json", self._parity(artifact, folder / GOLDEN))
        shutil.copytree(kept / GOLDEN, artifact.folder / GOLDEN)
        found: dict[str, Any] = read_json(kept / "parity.json")
        return found

    def _parity(self, artifact: Artifact, golden: Path | None) -> dict[str, Any]:
        figures: dict[str, Any] = worker.run(
            f"verifying {artifact.target['name']}", "deploytool.verify.parity:parity_job", self._limits,
            artifact=str(artifact.folder), cases=str(self.prepared.folder / "cases"),
            golden=str(golden) if golden else None,
        )  # fmt: skip
        return figures

    def _identity(self, artifact: Artifact) -> str:
        """A digest of all that an engine's outputs follow from, but for the cases."""
        files = [[f.path, f.sha256] for f in artifact.files if not f.path.startswith(f"{GOLDEN}/")]
        libraries = versions(find_backend(artifact.backend).packages)
        about = [files, dict(artifact.settings), artifact.entry, libraries, environment()["cpu_flags"]]
        return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]

    def compression(self, artifact: Artifact) -> dict[str, Any] | None:
        """How far a compressed model's artifact is from the uncompressed module; None for other models."""
        cases = self.prepared.folder / "original"
        if self.ref == self.original:
            return None
        figures: dict[str, Any] = worker.run(
            f"verifying {artifact.target['name']}", "deploytool.verify.parity:parity_job", self._limits,
            artifact=str(artifact.folder), cases=str(cases),
        )  # fmt: skip
        return figures

    def quality_of(self, artifact: Artifact, wanted: bool) -> tuple[dict[str, dict[str, Any]], dict[str, Any] | None]:
        """The report's "quality" and "generation"; empty when not wanted or when the model has no such hooks."""
        if not wanted or not (self.prepared.info["has_evaluate"] or self.prepared.info["has_prompts"]):
            return {}, None
        own = self._own_quality()
        found = own if artifact.backend == "eager" and self.ref == self.original else self._quality(artifact)
        return compare_quality(own, found, tuple(self.prepared.info["lower_is_better"]))

    def _own_quality(self) -> dict[str, Any]:
        """The reference's own figures, kept with the prepared model."""
        path = self.prepared.folder / "quality.json"
        if not path.is_file():
            write_json(path, self._quality(self.eager()))
        found: dict[str, Any] = read_json(path)
        return found

    def _quality(self, artifact: Artifact) -> dict[str, Any]:
        found: dict[str, Any] = worker.run(
            f"evaluating {artifact.target['name']}", "deploytool.verify.quality:quality_job", self._limits,
            artifact=str(artifact.folder), ref=asdict(self.original),
        )  # fmt: skip
        return found

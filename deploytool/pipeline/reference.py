"""One model's reference: its prepared folder, its eager artifact, its own figures, each made once when first needed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact
from deploytool.cache import Prepared
from deploytool.cases import case_files
from deploytool.errors import DeployError
from deploytool.pipeline.ahead import Ahead
from deploytool.pipeline.kept import parity_of
from deploytool.signature import Signature
from deploytool.source import ModelRef
from deploytool.storage import read_json
from deploytool.target import Target, load_target
from deploytool.verify.judge import compare_quality


class Reference:
    """What artifacts of one model are built from and measured against. `work` holds what is dropped afterwards.

    `uncompressed` is the reference of a compressed model's original where its artifacts are wanted, or why it has none.
    """

    def __init__(self, ref: ModelRef, prepared: Prepared, work: Path, limits: worker.Limits, seed: int,
                 ahead: Ahead | None = None):  # fmt: skip
        self.ref = ref
        self.prepared = prepared
        self.uncompressed: Reference | DeployError | None = None
        self.work = work
        self._limits = limits
        self._seed = seed
        self._ahead = ahead or Ahead(limits)
        self._made: dict[str, Artifact] = {}
        self._figures: dict[str, Any] | None = None

    @property
    def original(self) -> ModelRef:
        """The model that quality and speed are measured against: the uncompressed one."""
        original = self.prepared.info["original"]
        return ModelRef(**original) if original else self.ref

    @property
    def is_compressed(self) -> bool:
        """Whether the model was made from another, by `deploytool compress`."""
        return self.ref != self.original

    @property
    def signature(self) -> Signature:
        """The model's signature."""
        return Signature.from_json(read_json(self.prepared.folder / "signature.json"))

    @property
    def cases(self) -> list[Path]:
        """Recorded cases; the first is the one that is timed."""
        return case_files(self.prepared.folder / "cases")

    def engine(self, target: Target) -> worker.Worker:
        """The process that a target is built and verified in."""
        return self._ahead.take(target.name)

    def build(self, target: Target, out: Path, engine: worker.Worker) -> Artifact:
        """Build a target of the model into the empty folder `out`."""
        return self._build(target, self.ref, out, engine)

    def _build(self, target: Target, ref: ModelRef, out: Path, engine: worker.Worker) -> Artifact:
        engine.name = f"building {target.name}"
        engine.call("deploytool.backends.build:build_job", target=target.to_json(), prepared=str(self.prepared.folder),
                    ref=asdict(ref), fingerprint=self.prepared.fingerprint, out=str(out), seed=self._seed)  # fmt: skip
        return Artifact.load(out, check=False)  # written a moment ago, by us

    def eager(self) -> Artifact:
        """The eager artifact of the uncompressed model."""
        return self._once(load_target("eager"), self.original)

    def plain(self, name: str, done: Sequence[Mapping[str, Any]]) -> Artifact:
        """The artifact of the plain target `name`: the one exported in this run, else one built for the purpose."""
        for result in done:
            if result["target"] == name and result["status"] == "ok":
                return Artifact.load(Path(result["artifact"]), check=False)
        return self.made(load_target(name))

    def made(self, target: Target) -> Artifact:
        """An artifact that is dropped afterwards, built when it is first asked for."""
        return self._once(target, self.ref)

    def _once(self, target: Target, ref: ModelRef) -> Artifact:
        if target.name not in self._made:
            # A name of its own, since a build that failed may have left something.
            folder = Path(tempfile.mkdtemp(prefix=f"{target.name}-", dir=self.work))
            with self.engine(target) as engine:
                self._made[target.name] = self._build(target, ref, folder, engine)
        return self._made[target.name]

    def parity(self, artifact: Artifact, engine: worker.Worker) -> dict[str, Any]:
        """The artifact's outputs against the recorded ones; golden cases come to lie in its folder."""
        engine.name = f"verifying {artifact.target['name']}"
        figures, golden = parity_of(self.prepared, artifact, lambda: engine)
        shutil.copytree(golden, artifact.folder / GOLDEN)
        return figures

    def verify(self, artifact: Artifact) -> dict[str, Any]:
        """The artifact's outputs against the recorded ones, computed anew."""
        return self._compare(artifact, self.prepared.folder / "cases")

    def noise(self) -> dict[str, Any]:
        """How far the model's outputs move by rounding alone (lower/noise.py); kept with the prepared model."""
        if not self.ref.has_module:
            return {"outputs": {}, "skipped": dict.fromkeys(("fp64", "shuffled"), "an ONNX file has no module")}
        kept = self.prepared.folder / "noise.json"
        if kept.is_file():
            known: dict[str, Any] = read_json(kept)
            return known
        found: dict[str, Any] = worker.run(f"measuring the noise of {self.ref.name}",
                                           "deploytool.lower.noise:noise_job", self._limits, ref=asdict(self.ref),
                                           prepared=str(self.prepared.folder))  # fmt: skip
        return found

    def compression(self, artifact: Artifact) -> dict[str, Any] | None:
        """How far a compressed model's artifact is from the uncompressed module; None for other models."""
        return self._compare(artifact, self.prepared.folder / "original") if self.is_compressed else None

    def _compare(self, artifact: Artifact, cases: Path) -> dict[str, Any]:
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
        found = own if artifact.backend == "eager" and not self.is_compressed else self._quality(artifact)
        return compare_quality(own, found, tuple(self.prepared.info["lower_is_better"]))

    def _own_quality(self) -> dict[str, Any]:
        """The reference's own figures, of this run: what evaluate() reads may have changed since another."""
        if self._figures is None:
            self._figures = self._quality(self.eager())
        return self._figures

    def _quality(self, artifact: Artifact) -> dict[str, Any]:
        found: dict[str, Any] = worker.run(
            f"evaluating {artifact.target['name']}", "deploytool.verify.quality:quality_job", self._limits,
            artifact=str(artifact.folder), ref=asdict(self.original),
        )  # fmt: skip
        return found

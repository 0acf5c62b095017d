"""Builds and checks of a search: everything goes through the pipeline's own functions, and is done once."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from deploytool import worker
from deploytool.artifact import GOLDEN, Artifact, versions
from deploytool.backends.base import find_backend
from deploytool.bench.environment import environment
from deploytool.errors import DeployError, InputRefused
from deploytool.load.resolve import COMPRESSED, resolve
from deploytool.pipeline.export import Options, prepared_and_checked
from deploytool.pipeline.reference import Reference
from deploytool.source import ModelRef
from deploytool.storage import new_folder, sha256_file
from deploytool.tune.space import Config
from deploytool.tune.store import Store, digest
from deploytool.verify.judge import judge_parity, judge_quality


@dataclass(frozen=True)
class Product:
    """A built configuration.

    identity   digest of the engine's files and settings, the runtime's left out: equal products are measured once
    wrong      what of its parity lies outside the profile's limits
    """

    artifact: Artifact
    identity: str
    parity: Mapping[str, Any]
    wrong: tuple[str, ...]
    seconds: Mapping[str, float]


class Workshop:
    """Makes products of one model in `folder`; a context manager. `reference` is shared by all of them."""

    def __init__(self, ref: ModelRef, folder: Path, options: Options, store: Store, say: Callable[[str], None]):
        self.ref = ref
        self._folder = folder
        self._options = options
        self._store = store
        self._say = say
        self._stack = ExitStack()
        self._references: dict[tuple[Path | None, bool], Reference] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def reference(self, recipe: Path | None, graph: bool = True) -> Reference:
        """The reference of the model, or of what a recipe made of it; one with an ONNX graph serves all targets.

        Raises InputRefused (DT305) where a graph is needed and the model has none.
        """
        if not graph and (recipe, True) in self._references:
            return self._references[recipe, True]
        if (recipe, graph) not in self._references:
            ref = self.ref if recipe is None else self._compressed(recipe)
            self._say(f"preparing {ref.name}")
            prepared = prepared_and_checked(ref, self._options, graph, self._say)
            work = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix=".work-", dir=self._folder)))
            made = Reference(ref, prepared, work, self._options.limits, self._options.seed)
            self._references[recipe, graph] = made
        return self._references[recipe, graph]

    def compressed_folder(self, recipe: Path) -> Path:
        """Where a recipe's result lies."""
        return self._folder / "models" / f"{recipe.stem}-{self._recipe_key(recipe)[:8]}"

    def _recipe_key(self, recipe: Path) -> str:
        original = self.reference(None, False).prepared
        return digest([sha256_file(recipe), original.fingerprint, original.folder.name, self._options.seed])

    def _compressed(self, recipe: Path) -> ModelRef:
        folder, about = self.compressed_folder(recipe), {"recipe": self._recipe_key(recipe)}

        def compress() -> dict[str, Any]:
            self._say(f"compressing by {recipe.stem}")
            report: dict[str, Any] = worker.run(
                f"compressing {self.ref.name}", "deploytool.compress.run:compress_job", self._options.limits, self._say,
                ref=asdict(self.ref), recipe_path=str(recipe.absolute()), out=str(folder.absolute()),
                seed=self._options.seed, evaluate=self._options.quality, overwrite=True,
            )  # fmt: skip
            return {"before": report["before"], "after": report["after"]}

        if not (folder / COMPRESSED).is_file():
            self._store.forget("compress", about)
        self._store.once("compress", about, compress)
        return resolve(str(folder))

    def product(self, config: Config) -> Product:
        """The configuration, built and compared with the reference; raises what a build may raise."""
        about = self._build_key(config)
        folder = self._folder / "builds" / digest(about)[:16]
        if "value" in (self._store.find("build", about) or {}) and not _whole(folder):
            self._store.forget("build", about)
        found = self._store.once("build", about, lambda: self._build(config, folder))
        artifact = Artifact.load(folder, check=False)
        files = [[f.path, f.sha256] for f in artifact.files if not f.path.startswith(f"{GOLDEN}/")]
        identity = digest([files, artifact.backend, artifact.entry, _without_runtime(artifact.settings, config)])
        wrong = judge_parity(found["parity"], config.target.parity)
        return Product(artifact, identity, found["parity"], tuple(wrong), found["seconds"])

    def _build_key(self, config: Config) -> dict[str, Any]:
        """All that a build follows from. Prepared folders are named by model, libraries and deploytool's own code."""
        backend = find_backend(config.profile.backend)
        target = config.target.to_json()
        prepared = self.reference(config.recipe, backend.accepts == "onnx").prepared
        return {
            "name": Config(config.profile, (), config.recipe).name,
            "target": {k: target[k] for k in ("backend", "precision", "build", "device")},
            "prepared": prepared.folder.name,
            "fingerprint": prepared.fingerprint,
            "versions": dict(versions(backend.packages)),
            "cpu_flags": environment()["cpu_flags"],
            "seed": self._options.seed,
        }

    def _build(self, config: Config, folder: Path) -> dict[str, Any]:
        self._say(f"{config.name}: building")
        target = config.target
        reference = self.reference(config.recipe, find_backend(target.backend).accepts == "onnx")
        started = time.perf_counter()
        with new_folder(folder, overwrite=True) as made, reference.engine(target) as engine:
            artifact = reference.build(target, made, engine)
            built = time.perf_counter()
            parity = reference.parity(artifact, engine)
            artifact.save(known=artifact.files)
        return {"parity": parity, "seconds": {"build": built - started, "verify": time.perf_counter() - built}}

    def quality(self, config: Config, product: Product, max_drop: float) -> tuple[dict[str, Any], list[str]]:
        """Task metrics and decoding of a product, with the largest drop; and what of them is outside the limits."""
        reference = self.reference(config.recipe, find_backend(config.profile.backend).accepts == "onnx")
        about = {"identity": product.identity, "prepared": reference.prepared.folder.name}

        def evaluate() -> dict[str, Any]:
            self._say(f"{config.name}: evaluating")
            quality, generation = reference.quality_of(product.artifact, self._options.quality)
            compression = None if quality else reference.compression(product.artifact)
            return {"quality": quality, "generation": generation, "compression": compression}

        found: dict[str, Any] = self._store.once("quality", about, evaluate)
        limits = config.target.parity.model_copy(update={"metric_drop_max": max_drop})
        wrong = judge_quality(found["quality"], found["generation"], limits)
        # Parity is against what a recipe made of the model, the loss is against the model itself.
        dropped, measure = _drop(found["quality"], found["compression"] or product.parity)
        if not found["quality"] and dropped > max_drop:
            wrong.append(f"{measure} may be at most {max_drop:.2%} (got {dropped:.4%})")
        return {**found, "drop": dropped, "drop_of": measure}, wrong


def _whole(folder: Path) -> bool:
    try:
        Artifact.load(folder)
    except DeployError:
        return False
    return True


def _without_runtime(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in config.runtime}


def _drop(quality: Mapping[str, Mapping[str, Any]], parity: Mapping[str, Any]) -> tuple[float, str]:
    """The largest relative loss of a metric; of a model without metrics, the largest distance of an output."""
    if not parity["outputs"]:
        raise InputRefused("DT313", "a search needs outputs to be compared (got none)")
    if not quality:
        worst = min(figures["cosine"] for figures in parity["outputs"].values())
        return 1 - worst, "1 - cosine of the worst sample, since the model has no evaluate(),"
    drops = {}
    for name, pair in quality.items():
        sign = -1.0 if pair["lower_is_better"] else 1.0
        drops[name] = sign * (pair["reference"] - pair["candidate"]) / max(abs(pair["reference"]), 1e-12)
    name = max(drops, key=lambda key: drops[key])
    return drops[name], name

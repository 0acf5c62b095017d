"""Products of a search: configurations, built and checked by the pipeline's own functions, each once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploytool.artifact import GOLDEN, Artifact, versions
from deploytool.backends.base import find_backend
from deploytool.bench.environment import environment
from deploytool.errors import DeployError, InputRefused
from deploytool.pipeline.reference import Reference
from deploytool.tune.engine import Engine
from deploytool.tune.models import Models
from deploytool.tune.space import Config
from deploytool.tune.station import takes_graph
from deploytool.tune.store import Store, digest
from deploytool.verify.judge import judge_parity, judge_quality

BUILDS = "builds"


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
    """Makes products in `folder`, at the stations of `engine`."""

    def __init__(
        self, models: Models, folder: Path, engine: Engine, store: Store, seed: int, say: Callable[[str], None]
    ):
        self._models = models
        self._folder = folder
        self._engine = engine
        self._store = store
        self._seed = seed
        self._say = say

    def ready(self, config: Config) -> None:
        """Prepare the model that the configuration is built from; raises what that may raise."""
        self._reference(config)

    def product(self, config: Config) -> Product:
        """The configuration, built and compared with the reference; raises what a build may raise."""
        about = self._build_key(config)
        folder = self._folder / BUILDS / digest(about)[:16]
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
        prepared = self._reference(config).prepared
        return {
            "name": Config(config.profile, (), config.recipe).name,
            "target": {k: target[k] for k in ("backend", "precision", "build", "device")},
            "prepared": prepared.folder.name,
            "fingerprint": prepared.fingerprint,
            "versions": dict(versions(backend.packages)),
            "cpu_flags": environment()["cpu_flags"],
            "seed": self._seed,
        }

    def _build(self, config: Config, folder: Path) -> dict[str, Any]:
        self._say(f"{config.name}: building")
        reference = self._reference(config)
        found: dict[str, Any] = self._engine.run("build", ref=reference.ref, prepared=reference.prepared,
                                                 target=config.target, folder=folder)  # fmt: skip
        return found

    def _reference(self, config: Config) -> Reference:
        return self._models.reference(config.recipe, takes_graph(config.profile))

    def quality(self, config: Config, product: Product, max_drop: float) -> tuple[dict[str, Any], list[str]]:
        """Task metrics and decoding of a product, with the largest drop; and what of them is outside the limits."""
        reference = self._reference(config)
        about = {"identity": product.identity, "prepared": reference.prepared.folder.name}

        def evaluate() -> Any:
            self._say(f"{config.name}: evaluating")
            return self._engine.run("evaluate", ref=reference.ref, prepared=reference.prepared,
                                    artifact=product.artifact)  # fmt: skip

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

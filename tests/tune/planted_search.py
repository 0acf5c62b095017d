"""A search whose builds and speeds are planted: what must be chosen, and what it cost, is known."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from deploytool.artifact import Artifact
from deploytool.signature import Signature, TensorSpec
from deploytool.tune.space import Config
from deploytool.tune.track import Entrant
from deploytool.tune.workshop import Product

SIGNATURE = Signature((TensorSpec("x", "float32", (1,)),), (TensorSpec("y", "float32", (1,)),))
KEPT = ["a", "b"]  # what every int8 build leaves in fp32
PARITY = {"cases": 1, "outputs": {"y": {"cosine": 1.0}}}


def milliseconds(config: Config, case: int) -> float:
    """What a configuration takes: int8 is quicker, more so with nothing kept in fp32; threads and buckets matter."""
    base = {"ort": 10.0, "ort-int8": 7.0, "openvino": 9.0, "torchscript": 16.0, "openvino-int8": 8.5}
    changes = dict(config.changes)
    time = base[config.profile.name] * (case + 1)
    time *= 0.9 if changes.get("build.keep_fp32") == 0 else 1.0
    time *= 0.95 if changes.get("build.reduce_range") is False else 1.0
    time *= 0.97 if changes.get("build.preset") == "performance" else 1.0
    return time * (1.6 if changes.get("runtime.threads") == 1 else 0.98 if "runtime.spinning" in changes else 1.0)


class PlantedStation:
    """Times are what the entrant's artifact says of itself, with some noise.

    `unlucky` is how much longer every run of a process takes in half of the processes, whose number is `lives`.
    """

    def __init__(self, noise: float = 0.01, unlucky: float = 0.0):
        self.noise, self.unlucky = noise, unlucky
        self.rounds = self.lives = 0

    def race(self, entrant: Entrant, anchor: Entrant, count: int, seed: Sequence[int]) -> dict[str, Any]:
        both = list({e.key: e for e in (anchor, entrant)}.values())
        rounds = [self.round(both, [*seed, number], fresh=True) for number in range(count)]
        lean = entrant.artifact.settings["lean"]
        return {"rounds": rounds, "peak_rss_bytes": 3_000_000 if lean else 4_000_000}

    def round(self, members: Sequence[Entrant], seed: Sequence[int], *, fresh: bool = False) -> dict[str, Any]:
        rng = np.random.default_rng(list(seed))
        self.rounds += 1
        self.lives += fresh
        ms = {}
        for entrant in members:
            life = np.random.default_rng([*seed[:1], int(entrant.key, 16), self.lives])
            noise = np.exp(self.noise * rng.standard_normal((2, 2))) * (1 + self.unlucky * life.integers(2))
            ms[entrant.key] = [[entrant.artifact.settings["ms"][case] * e for e in noise[case]] for case in range(2)]
        joules = {key: [[100 / ms for ms in turns] for turns in cases] for key, cases in ms.items()}
        return {"ms": ms, "joules": joules, "guard": [1.0, 1.0]}

    def clear(self) -> None: ...


class Planted:
    """Workshop and engine in one: what was built and evaluated is counted."""

    def __init__(
        self, folder: Path, drops: Mapping[str, float], noise: float = 0.01, width: int = 1, unlucky: float = 0.0
    ):
        self.folder, self.drops, self.width = folder, drops, width
        self.station = PlantedStation(noise, unlucky)
        self.built: list[str] = []
        self.evaluated: list[str] = []
        self.fails: dict[str, Exception] = {}
        self.times: Callable[[Config, int], float] = milliseconds
        self.readied: list[str] = []
        self.fresh: list[bool] = []

    def ready(self, config: Config) -> None:
        assert threading.current_thread() is threading.main_thread(), "its child would outlive an interruption"
        self.readied.append(config.name)
        if (name := f"model of {config.profile.name}") in self.fails:
            raise self.fails[name]

    def product(self, config: Config) -> Product:
        build = " ".join([config.profile.name, *(f"{k}={v}" for k, v in config.changes if k.startswith("build."))])
        if build in self.fails:
            raise self.fails[build]
        if build not in self.built:
            self.built.append(build)
        kept = {"kept_fp32": KEPT, "scheme": "unsmoothed"} if config.profile.precision == "int8" else {}
        told = {"ms": [self.times(config, 0), self.times(config, 1)], "lean": config.profile.backend == "torchscript"}
        artifact = Artifact(self.folder, "planted", "onnx", "m", config.profile.precision, SIGNATURE,
                            settings={**kept, **told})  # fmt: skip
        return Product(artifact, build, PARITY, (), {})

    def quality(self, config: Config, product: Product, max_drop: float) -> tuple[dict[str, Any], list[str]]:
        self.evaluated.append(config.name)
        drop = max([d for name, d in self.drops.items() if name in config.name], default=0.0)
        return {"quality": {}, "generation": None, "drop": drop, "drop_of": "m"}, [
            "too much"
        ] if drop > max_drop else []

    def run(self, piece: str, /, **arguments: Any) -> Any:
        self.fresh += [arguments["fresh"]] if piece == "round" else []
        return getattr(self.station, piece)(**arguments)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        with ThreadPoolExecutor(self.width) as pool:
            return list(pool.map(function, items))

    def clear(self) -> None: ...

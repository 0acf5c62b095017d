"""The search: cheap proxies first, measured truth last.

1. Every target as its profile says is built and compared with the reference; what passes races a fixed artifact, the
   anchor, for a few rounds. The task metric is taken only of what is quick enough to matter.
2. Around those within reach of the best, one setting is changed at a time, and what helped is put together; then the
   runtime settings of the best builds, which need no build.
3. Those near the best run in rounds against each other and the best plain artifact; heat after heat fewer are near.
4. The last two are measured once more in fresh processes, and the better one of all rounds is chosen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deploytool.bench.environment import environment
from deploytool.bench.statistics import MIN_BLOCKS
from deploytool.errors import CheckFailed, DeployError
from deploytool.storage import sha256_file
from deploytool.tune.space import Config, build_choices, everything, runtime_choices
from deploytool.tune.store import Store, digest
from deploytool.tune.track import Entrant, Track, case_log_ratios, log_ratios, per_case
from deploytool.tune.workshop import Product, Workshop

Objective = Literal["latency", "size", "memory", "energy"]
_REACH = math.log(1.35)  # a target this much slower than the best is not varied: no setting makes up for so much
_RACE_ROUNDS = 3
_EXHAUSTIVE_ROUNDS = 12
_HEATS = (3, 4, 6, 8)  # rounds of each heat
_NEAR = tuple(math.log(x) for x in (1.15, 1.08, 1.05, 1.03))  # how near to the best who takes part in it must be
_FINAL_ROUNDS = 8
_TOLERATED = 0.02  # how much slower than the best plain artifact a bucket may look before the configuration is out
_MOST_ENTRANTS, _MOST_FINALISTS = 6, 2
_BUILDS_TO_VARY = 2
_FAMILY_NEAR = math.log(1.10)  # a target whose best is this much slower after one step is left alone
_STEPS = 2  # of putting together what helped
_HELPED = 0.005  # what a change must gain to be put together with others
_SEARCHING = 0.75  # share of the budget after which nothing new is built


@dataclass(frozen=True)
class Question:
    """What is asked for. `buckets` name what each case stands for."""

    objective: Objective
    max_drop: float
    budget_seconds: float
    buckets: tuple[str, ...]
    exhaustive: bool = False
    seed: int = 0


@dataclass
class Trial:
    """What is known of one configuration: it grows as the search goes on.

    value    what is minimized: ln(time / anchor's time), or ln of bytes
    reason   why it is out of the question, or None
    """

    config: Config
    product: Product | None = None
    value: float | None = None
    reason: str | None = None
    quality: dict[str, Any] | None = None
    peak_rss_bytes: int | None = None
    rounds: int = 0


@dataclass
class Search:
    """One search over one model."""

    shop: Workshop
    track: Track
    store: Store
    question: Question
    cases: Sequence[Path]
    say: Callable[[str], None]
    trials: dict[str, Trial] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    anchor: Trial | None = None
    out_of_time: bool = False

    def __post_init__(self) -> None:
        self._before = self.store.seconds()
        self._started = time.monotonic()
        self._unit = "joules" if self.question.objective == "energy" else "ms"
        about = environment()
        machine = {key: about[key] for key in ("cpu", "cpu_flags", "cores_usable", "packages")}
        self._place = {"machine": machine, "cases": [sha256_file(case) for case in self.cases]}

    @property
    def spent(self) -> float:
        """Seconds of this run and of the work that earlier runs recorded."""
        return self._before + time.monotonic() - self._started

    def run(self, start: Iterable[Config]) -> Trial:
        """Search from these configurations; returns the chosen one. Raises CheckFailed when none keeps the quality."""
        families = list(start)
        for config in families:
            self.consider(config)
        if self.question.exhaustive:
            for family in families:
                for config in everything(family, self.question.objective):
                    self.consider(config)
        else:
            self._descend(families)
            self._vary_runtime()
        best = self._finals() if self.question.objective in ("latency", "energy") else self.best()
        if best is None:
            raise self._nothing()
        self._complete_front()
        return best

    # -- one configuration

    def consider(self, config: Config) -> Trial:
        """Build, compare and value a configuration, unless the budget is used up; what is known already stays."""
        if config.name in self.trials:
            return self.trials[config.name]
        if self.trials and self.spent > _SEARCHING * self.question.budget_seconds and not self.question.exhaustive:
            self.out_of_time = True
            return Trial(config, reason="the budget was used up before it was tried")
        trial = self.trials[config.name] = Trial(config)
        try:
            trial.product = self.shop.product(config)
            if trial.product.wrong:
                trial.reason = "; ".join(trial.product.wrong)
            elif not trial.product.artifact.executes:
                trial.reason = "built for hardware that is not here: it cannot be measured"
            else:
                self._value(trial)
        except DeployError as error:
            self.say(f"{config.name}: {error.message}")
            trial.reason = error.message
        return trial

    def _value(self, trial: Trial) -> None:
        assert trial.product is not None
        objective = self.question.objective
        if objective == "size":
            trial.value = math.log(trial.product.artifact.size_bytes)
            return
        if self.anchor is None:
            self.anchor = trial
        count = _EXHAUSTIVE_ROUNDS if self.question.exhaustive else _RACE_ROUNDS
        about = {"place": self._place, "anchor": self._key(self.anchor), "entrant": self._key(trial), "rounds": count,
                 "energy": objective == "energy"}  # fmt: skip
        found = self.store.once("race", about, lambda: self._race(trial, about))
        self.rounds += found["rounds"]
        trial.peak_rss_bytes = found["peak_rss_bytes"]
        self._score(trial)
        if objective == "memory":
            trial.value = math.log(found["peak_rss_bytes"])

    def _race(self, trial: Trial, about: Mapping[str, Any]) -> dict[str, Any]:
        assert self.anchor is not None
        self.say(f"{trial.config.name}: racing")
        anchor, entrant = self._entrant(self.anchor), self._entrant(trial)
        both = [anchor] if anchor.key == entrant.key else [anchor, entrant]
        rng = self._random(about)
        try:
            rounds = [self.track.round(both, rng) for _ in range(int(about["rounds"]))]
            return {"rounds": rounds, "peak_rss_bytes": self.track.peak_rss_bytes(entrant)}
        finally:
            if entrant.key != anchor.key:
                self.track.close(entrant.key)

    def _score(self, trial: Trial) -> None:
        assert self.anchor is not None
        ratios = log_ratios(self.rounds, self._key(trial), self._key(self.anchor), self._unit)
        trial.rounds = len(ratios)
        trial.value = -float(np.median(ratios))

    def _key(self, trial: Trial) -> str:
        assert trial.product is not None
        return digest([trial.product.identity, trial.config.runtime])[:16]

    def _entrant(self, trial: Trial) -> Entrant:
        assert trial.product is not None
        return Entrant(self._key(trial), trial.product.artifact, trial.config.runtime)

    def _random(self, about: Mapping[str, Any]) -> np.random.Generator:
        return np.random.default_rng([self.question.seed, int(digest(about)[:8], 16)])

    # -- which are good

    def valued(self) -> list[Trial]:
        """The trials that have a value and no reason against them, best first."""
        found = [t for t in self.trials.values() if t.value is not None and t.reason is None]
        return sorted(found, key=lambda t: (t.value, t.config.name))

    def fit(self, trial: Trial) -> bool:
        """Whether it keeps the quality; evaluated when first asked, since that may take longer than all the rest."""
        if trial.reason is None and trial.quality is None and trial.product is not None:
            try:
                trial.quality, wrong = self.shop.quality(trial.config, trial.product, self.question.max_drop)
                trial.reason = "; ".join(wrong) or None
            except DeployError as error:
                trial.reason = error.message
        return trial.reason is None

    def best(self, among: Callable[[Trial], bool] = lambda trial: True) -> Trial | None:
        """The best trial that keeps the quality."""
        return next((t for t in self.valued() if among(t) and self.fit(t)), None)

    def _nothing(self) -> CheckFailed:
        lines = [f"{t.config.name}: {t.reason}" for t in self.trials.values()]
        return CheckFailed("DT106", f"a configuration must lose at most {self.question.max_drop:.2%} (none of "
                           f"{len(self.trials)} does)", detail=lines[:12],
                           fix="raise --max-drop, or name more targets or recipes")  # fmt: skip

    # -- where to look next

    def _descend(self, families: Sequence[Config]) -> None:
        """Change one setting at a time in every family within reach; then put together what helped, where it is near.

        What looks best is evaluated after every step, so that the next one starts from what keeps the quality.
        """
        for reach in (self._reach, *[min(self._reach, _FAMILY_NEAR)] * _STEPS):
            best, before = self.best(), len(self.trials)
            for family in families:
                here = [t for t in self.trials.values() if _family(t.config) == _family(family)]
                if not here:
                    continue
                own = min(here, key=lambda t: (t.reason is not None, _value(t)))  # refused ones where there is no other
                if own.value is None or (best is not None and _value(own) - _value(best) > reach):
                    continue
                for config in self._next(self.trials[family.name], own):
                    self.consider(config)
            if len(self.trials) == before:
                return

    def _next(self, base: Trial, best: Trial) -> list[Config]:
        """What to try next in a family: each change alone first, then those that helped on top of its best."""
        choices = build_choices(base.config.profile, self.question.objective) + self._layers(base)
        singles = [base.config.with_change(key, value) for key, value in choices]
        if not all(config.name in self.trials for config in singles):
            return singles
        tried = {change: self.trials[config.name] for change, config in zip(choices, singles, strict=True)}
        helped = sorted((_value(t), change) for change, t in tried.items()
                        if t.reason is None and _value(t) < _value(base) - _HELPED)  # fmt: skip
        merged = best.config
        for _, (key, value) in reversed(helped):  # the best change of a setting is made last
            merged = merged if key in dict(best.config.changes) else merged.with_change(key, value)
        return [merged]

    def _layers(self, base: Trial) -> list[tuple[str, Any]]:
        """How many layers to keep in fp32 beside the profile's own choice and none: more of them, or half as many."""
        count = len(base.product.artifact.settings.get("kept_fp32") or ()) if base.product else 0
        none = self.trials.get(base.config.with_change("build.keep_fp32", 0).name)
        if count and base.reason is not None:
            return [("build.keep_fp32", 2 * count)]
        return [("build.keep_fp32", count // 2)] if count > 1 and none is not None and none.reason is not None else []

    @property
    def _reach(self) -> float:
        return math.inf if self.question.objective == "size" else _REACH

    def _vary_runtime(self) -> None:
        """One thread, and no spinning, for the builds near the best."""
        if self.question.objective == "size":
            return
        seen: set[str] = set()
        for trial in self.valued():
            assert trial.product is not None
            if len(seen) < _BUILDS_TO_VARY and trial.product.identity not in seen and self.fit(trial):
                seen.add(trial.product.identity)
                for key, value in runtime_choices(trial.config.profile):
                    self.consider(trial.config.with_change(key, value))

    # -- measured truth

    def _finals(self) -> Trial | None:
        """Rounds of those near the best with the best plain one, then the last of them again in fresh processes.

        Who looks best after a short race was lucky too: those who are near the best as it looks after a heat take part
        in the next one.
        """
        for number, (near, count) in enumerate(zip(_NEAR, _HEATS, strict=True)):
            field = self._near(near)
            if not field or self.spent > self.question.budget_seconds:
                break
            self._heat(f"heat {number + 1}", [*field, *_wanted(field, self._plain())], count)
        last = self._near(_NEAR[-1])[:_MOST_FINALISTS]
        entrants = [*last, *_wanted(last, self._plain())]
        self.track.clear()
        self._heat("final", entrants, _FINAL_ROUNDS)
        plain = self._plain()
        return min((t for t in entrants if t is plain or not self._loses_somewhere(t, plain)), key=_value, default=None)

    def _loses_somewhere(self, trial: Trial, plain: Trial | None) -> bool:
        """Whether it is slower than the plain artifact in one of the buckets: what is best on average must not be."""
        if plain is None:
            return False
        ratios = [case_log_ratios(self.rounds, self._key(trial), self._key(plain), case, self._unit)
                  for case in range(len(self.cases))]  # fmt: skip
        return any(len(r) >= MIN_BLOCKS and float(np.median(r)) < -_TOLERATED for r in ratios)

    def _near(self, near: float) -> list[Trial]:
        """Those that keep the quality and are so near to the best of them, at most as many as can be open at once."""
        best = self.best()
        if best is None:
            return []
        close = _distinct([t for t in self.valued() if _value(t) - _value(best) <= near], self._key)
        return [t for t in close if self.fit(t)][:_MOST_ENTRANTS]

    def _plain(self) -> Trial | None:
        return self.best(lambda trial: trial.config.profile.precision == "fp32")

    def _heat(self, kind: str, entrants: Sequence[Trial], count: int) -> None:
        assert self.anchor is not None
        everybody = _distinct([*entrants, self.anchor], self._key)
        if len(everybody) < 2:
            return
        self.say(f"{kind}: {count} rounds of {', '.join(t.config.name for t in everybody)}")
        members = [self._entrant(trial) for trial in everybody]
        for number in range(count):
            about = {"place": self._place, "kind": kind, "members": sorted(m.key for m in members), "round": number,
                     "energy": self._unit == "joules"}  # fmt: skip
            rng = self._random(about)
            self.rounds.append(self.store.once("round", about, lambda rng=rng: self.track.round(members, rng)))  # type: ignore[misc]
        for trial in entrants:
            self._score(trial)

    def _complete_front(self) -> None:
        """Evaluate what would stand on the front of time, size and quality, so that the front tells the truth."""
        for trial in sorted(self.valued(), key=_value):
            if self.spent > self.question.budget_seconds:
                return
            others = [t for t in self.valued() if t is not trial and t.quality is not None]
            if not any(_value(t) <= _value(trial) and _size(t) <= _size(trial) for t in others):
                self.fit(trial)

    def figures(self, trial: Trial) -> dict[str, Any]:
        """A trial as JSON."""
        key = self._key(trial) if trial.product is not None else ""
        timed = any(key in r["ms"] for r in self.rounds)
        times = per_case(self.rounds, key) if timed else []
        return {
            "name": trial.config.name,
            "target": trial.config.profile.name,
            "recipe": trial.config.recipe.stem if trial.config.recipe else None,
            "changes": {k: list(v) if isinstance(v, tuple) else v for k, v in trial.config.changes},
            "status": "fit" if trial.quality and not trial.reason else "refused" if trial.reason else "not evaluated",
            "reason": trial.reason,
            "size_bytes": trial.product.artifact.size_bytes if trial.product else None,
            "peak_rss_bytes": trial.peak_rss_bytes,
            "p50_ms": dict(zip(self.question.buckets, times, strict=True)) if times else {},
            "relative_time": self._relative(key) if timed else None,
            "rounds": trial.rounds,
            "drop": trial.quality["drop"] if trial.quality else None,
            "quality": trial.quality["quality"] if trial.quality else {},
        }

    def _relative(self, key: str) -> float:
        assert self.anchor is not None
        return math.exp(-float(np.median(log_ratios(self.rounds, key, self._key(self.anchor)))))


def _value(trial: Trial) -> float:
    return math.inf if trial.value is None else trial.value


def _size(trial: Trial) -> int:
    return trial.product.artifact.size_bytes if trial.product else 0


def _family(config: Config) -> tuple[str, Path | None]:
    return config.profile.name, config.recipe


def _distinct(trials: Sequence[Trial], key: Callable[[Trial], str]) -> list[Trial]:
    """The trials without those that are the very same files and settings as an earlier one."""
    return list({key(trial): trial for trial in reversed(trials)}.values())[::-1]


def _wanted(field: Sequence[Trial], plain: Trial | None) -> list[Trial]:
    return [plain] if plain is not None and plain not in field else []

"""The search: cheap proxies first, measured truth last.

1. Every target as its profile says is built and compared with the reference; what passes races a fixed artifact, the
   anchor, for a few rounds. The task metric is taken only of what is quick enough to matter.
2. Around those within reach of the best, one setting is changed at a time, and what helped is put together; not where
   one is slower than the best and loses too much as well. Then the runtime settings of the best builds, which need no
   build.
3. Those near the best run in rounds against each other and the best plain artifacts; heat after heat fewer are near.
4. The last two are measured once more in fresh processes, and the best of all rounds is chosen: a plain one where it is
   as quick, and none that is slower than the quickest plain one of a bucket.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deploytool.bench.statistics import center
from deploytool.errors import CheckFailed, DeployError
from deploytool.storage import sha256_file
from deploytool.tune.choice import TOLERATED, Standings
from deploytool.tune.engine import Engine, Nowhere
from deploytool.tune.space import Config, build_choices, everything, runtime_choices
from deploytool.tune.station import machine
from deploytool.tune.store import Store, digest
from deploytool.tune.track import Entrant, log_ratios, per_case, short
from deploytool.tune.trial import Question, Trial, distinct, family_of, few_of_each, size_of, value_of
from deploytool.tune.workshop import Workshop

_REACH = math.log(1.35)  # a target this much slower than the best is not varied: no setting makes up for so much
_RACE_ROUNDS = 3
_EXHAUSTIVE_ROUNDS = 12
_HEATS = (3, 4, 6, 8)  # rounds of each heat
_NEAR = tuple(math.log(x) for x in (1.15, 1.08, 1.05, 1.03))  # how near to the best who takes part in it must be
_FINAL_ROUNDS = 8
_LIFE = 3  # rounds of a heat that processes live, where runs are short; in the final it is one
_MOST_ENTRANTS, _MOST_FINALISTS = 6, 2
_MOST_OF_A_FAMILY = 2  # in a heat: they differ in a setting, and so little in speed that any of the best will do
_BUILDS_TO_VARY = 2
_FAMILY_NEAR = math.log(1.10)  # a target whose best is this much slower after one step is left alone
_STEPS = 2  # of putting together what helped
_HELPED = 0.005  # what a change must gain to be put together with others
_SEARCHING = 0.75  # share of the budget after which nothing new is built


@dataclass
class Search:
    """One search over one model. Where there are several stations, as many configurations are tried at once."""

    shop: Workshop
    engine: Engine
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
        self.unit = "joules" if self.question.objective == "energy" else "ms"
        self._place = {"machine": machine(), "cases": [sha256_file(case) for case in self.cases]}

    @property
    def spent(self) -> float:
        """Seconds of this run and of the work that earlier runs recorded."""
        return self._before + time.monotonic() - self._started

    def run(self, start: Iterable[Config]) -> Trial:
        """Search from these configurations; returns the chosen one. Raises CheckFailed when none keeps the quality."""
        families = list(start)
        self.consider(families)
        if self.question.exhaustive:
            self.consider(c for family in families for c in everything(family, self.question.objective))
        else:
            self._descend(families)
            self._vary_runtime()
        best = self._finals() if self.question.objective in ("latency", "energy") else self.best()
        if best is None:
            raise self._nothing()
        self._complete_front()
        return best

    # -- single configurations

    def consider(self, configs: Iterable[Config]) -> None:
        """Build, compare and value configurations, as long as the budget lasts; what is known already stays."""
        waiting = list({config.name: config for config in configs if config.name not in self.trials}.values())
        while waiting:
            if self.trials and self.spent > _SEARCHING * self.question.budget_seconds and not self.question.exhaustive:
                self.out_of_time = True
                return
            # The anchor is alone: every other one races against it.
            count = self.engine.width if self.anchor or self.question.objective == "size" else 1
            trials = [Trial(config) for config in waiting[:count]]
            waiting = waiting[count:]
            self.trials |= {trial.config.name: trial for trial in trials}
            for trial in trials:  # here, and not beside each other: who interrupts the search ends what it works at
                self._ready(trial)
            self.engine.map(self._make, trials)
            for trial, rounds in zip(trials, self.engine.map(self._race, trials), strict=True):
                self.rounds += rounds
                self._value(trial)

    def _ready(self, trial: Trial) -> None:
        try:
            self.shop.ready(trial.config)
        except DeployError as error:
            self._refuse(trial, error)

    def _make(self, trial: Trial) -> None:
        if trial.reason is not None:
            return
        try:
            trial.product = self.shop.product(trial.config)
        except Nowhere:
            raise
        except DeployError as error:
            self._refuse(trial, error)
            return
        if trial.product.wrong:
            trial.reason = "; ".join(trial.product.wrong)
        elif not trial.product.artifact.executes:
            trial.reason = "built for hardware that is not here: it cannot be measured"

    def _refuse(self, trial: Trial, error: DeployError) -> None:
        self.say(f"{trial.config.name}: {error.message}")
        trial.reason = error.message

    def _race(self, trial: Trial) -> list[dict[str, Any]]:
        """The rounds of a trial with the anchor; the first that gets so far is the anchor of all."""
        if trial.reason is not None or self.question.objective == "size":
            return []
        self.anchor = self.anchor or trial
        anchor, entrant = self._entrant(self.anchor), self._entrant(trial)
        count = _EXHAUSTIVE_ROUNDS if self.question.exhaustive else _RACE_ROUNDS
        about = {"place": self._place, "anchor": anchor.key, "entrant": entrant.key, "rounds": count,
                 "energy": self.unit == "joules"}  # fmt: skip

        def race() -> Any:
            self.say(f"{trial.config.name}: racing")
            return self.engine.run("race", entrant=entrant, anchor=anchor, count=count, seed=self._seed(about))

        try:
            found = self.store.once("race", about, race)
        except Nowhere:
            raise
        except DeployError as error:
            self._refuse(trial, error)
            return []
        trial.peak_rss_bytes = found["peak_rss_bytes"]
        rounds: list[dict[str, Any]] = found["rounds"]
        return rounds

    def _value(self, trial: Trial) -> None:
        if trial.reason is not None or trial.product is None:
            return
        if self.question.objective == "size":
            trial.value = math.log(trial.product.artifact.size_bytes)
            return
        self._score(trial)
        if self.question.objective == "memory":
            assert trial.peak_rss_bytes is not None
            trial.value = math.log(trial.peak_rss_bytes)

    def _score(self, trial: Trial) -> None:
        assert self.anchor is not None
        ratios = log_ratios(self.rounds, self.key(trial), self.key(self.anchor), self.unit)
        trial.rounds = len(ratios)
        trial.value = -center(ratios)

    def key(self, trial: Trial) -> str:
        """What its rounds are recorded under: the same files with the same runtime settings are the same."""
        assert trial.product is not None
        return digest([trial.product.identity, trial.config.runtime])[:16]

    def _entrant(self, trial: Trial) -> Entrant:
        assert trial.product is not None
        return Entrant(self.key(trial), trial.product.artifact, trial.config.runtime)

    def _seed(self, about: Mapping[str, Any]) -> list[int]:
        return [self.question.seed, int(digest(about)[:8], 16)]

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
            except Nowhere:
                raise
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
            wanted: list[Config] = []
            for family in families:
                here = [t for t in self.trials.values() if family_of(t.config) == family_of(family)]
                if not here:
                    continue
                # A refused one stands for the family where there is no other.
                own = min(here, key=lambda t: (t.reason is not None, value_of(t)))
                if own.value is None or (best is not None and self._behind(own, best, reach)):
                    continue
                wanted += self._next(self.trials[family.name], own)
            self.consider(wanted)
            if len(self.trials) == before:
                return

    def _behind(self, own: Trial, best: Trial, reach: float) -> bool:
        """Whether a family is left alone: out of reach, or slower than the best and yet outside the allowed loss.

        Settings trade quality for time: what mends the quality does not make it quicker as well.
        """
        behind = value_of(own) - value_of(best)
        return behind > reach or (behind > TOLERATED and not self.fit(own))

    def _next(self, base: Trial, best: Trial) -> list[Config]:
        """What to try next in a family: each change alone first, then those that helped on top of its best."""
        came_to = _came_to(base)
        choices = [(key, value) for key, value in build_choices(base.config.profile, self.question.objective)
                   if came_to.get(key.removeprefix("build.")) != value] + self._layers(base)  # fmt: skip
        singles = [base.config.with_change(key, value) for key, value in choices]
        if not all(config.name in self.trials for config in singles):
            return singles
        tried = {change: self.trials[config.name] for change, config in zip(choices, singles, strict=True)}
        helped = sorted((value_of(t), change) for change, t in tried.items()
                        if t.reason is None and value_of(t) < value_of(base) - _HELPED)  # fmt: skip
        merged = best.config
        for _, (key, value) in reversed(helped):  # the best change of a setting is made last
            merged = merged if key in dict(best.config.changes) else merged.with_change(key, value)
        return [merged]

    def _layers(self, base: Trial) -> list[tuple[str, Any]]:
        """How many layers to keep in fp32 beside the profile's own choice and none: more of them, or half as many."""
        if base.config.profile.build.get("mixed") == "measured":
            return []  # which counts by itself
        count = _came_to(base).get("keep_fp32", 0)
        none = self.trials.get(base.config.with_change("build.keep_fp32", 0).name)
        if count and base.reason is not None:
            return [("build.keep_fp32", 2 * count)]
        return [("build.keep_fp32", count // 2)] if count > 1 and none is not None and none.reason is not None else []

    @property
    def _reach(self) -> float:
        return math.inf if self.question.objective == "size" else _REACH

    def _vary_runtime(self) -> None:
        """Fewer threads, and no spinning, for the builds near the best."""
        if self.question.objective == "size":
            return
        seen: set[str] = set()
        wanted: list[Config] = []
        for trial in self.valued():
            assert trial.product is not None
            if len(seen) < _BUILDS_TO_VARY and trial.product.identity not in seen and self.fit(trial):
                seen.add(trial.product.identity)
                wanted += [trial.config.with_change(*change) for change in runtime_choices(trial.config.profile)]
        self.consider(wanted)

    # -- measured truth

    def _finals(self) -> Trial | None:
        """Rounds of those near the best with the best plain ones, then the last of them again in fresh processes.

        Who looks best after a short race was lucky too: who is near the best after a heat takes part in the next one.
        """
        for number, (near, count) in enumerate(zip(_NEAR, _HEATS, strict=True)):
            field = self._near(near)
            if len(field) < 2 or self.spent > self.question.budget_seconds:
                break  # nobody is left to beat the best: the final is its last word
            self.heat(f"heat {number + 1}", self._beside_plains(field), count)
        entrants = self._beside_plains(self._near(_NEAR[-1])[:_MOST_FINALISTS])
        self.engine.clear()
        self.heat("final", entrants, _FINAL_ROUNDS)
        return self._standings().choice(entrants, self._plains(entrants))

    def _beside_plains(self, field: Sequence[Trial]) -> list[Trial]:
        return distinct([*field, *self._plains(self.trials.values())], self.key)

    def _near(self, near: float) -> list[Trial]:
        """Those that keep the quality and are so near to the best of them, at most as many as can be open at once.

        What surely loses somewhere to the best plain one can win no more, and is no measure either.
        """
        able = self._standings().able(self.valued(), self._plains(self.trials.values()), self.fit)
        if (best := next(filter(self.fit, able), None)) is None:
            return []
        close = distinct([t for t in able if value_of(t) - value_of(best) <= near], self.key)
        self.engine.map(self.fit, close)
        return few_of_each(filter(self.fit, close), _MOST_OF_A_FAMILY)[:_MOST_ENTRANTS]

    def _plains(self, among: Collection[Trial]) -> list[Trial]:
        """The best unquantized artifact of the model itself on average, then that of each bucket; none fits: []."""
        plain = [t for t in self.valued()
                 if t in among and t.config.profile.precision == "fp32" and t.config.recipe is None]  # fmt: skip
        if self.anchor is None or not any(self.fit(t) for t in plain):
            return []
        standings, orders = self._standings(), [plain]
        orders += [standings.quickest(plain, self.anchor, bucket) for bucket in range(len(self.cases))]
        return [next(t for t in order if self.fit(t)) for order in orders]

    def _standings(self) -> Standings:
        return Standings(self.rounds, self.key, len(self.cases), self.unit, self.question.seed)

    def heat(self, kind: str, entrants: Sequence[Trial], count: int) -> None:
        """So many rounds of the entrants and the anchor, after which each has a new value."""
        assert self.anchor is not None
        everybody = distinct([*entrants, self.anchor], self.key)
        if len(everybody) < 2:
            return
        self.say(f"{kind}: {count} rounds of {', '.join(t.config.name for t in everybody)}")
        members = [self._entrant(trial) for trial in everybody]
        life = 1 if kind == "final" else _LIFE
        brief = any(short(self.rounds, member.key) for member in members)

        def play(number: int) -> Any:
            about = {"place": self._place, "kind": kind, "members": sorted(m.key for m in members), "round": number,
                     "energy": self.unit == "joules"}  # fmt: skip
            return self.store.once("round", about, lambda: self.engine.run(
                "round", members=members, seed=self._seed(about), fresh=brief and number % life == 0))  # fmt: skip

        self.rounds += self.engine.map(play, range(count))
        for trial in entrants:
            self._score(trial)

    def _complete_front(self) -> None:
        """Evaluate what would stand on the front of time, size and quality, so that the front tells the truth."""
        for trial in sorted(self.valued(), key=value_of):
            if self.spent > self.question.budget_seconds:
                return
            others = [t for t in self.valued() if t is not trial and t.quality is not None]
            if not any(value_of(t) <= value_of(trial) and size_of(t) <= size_of(trial) for t in others):
                self.fit(trial)

    def figures(self, trial: Trial) -> dict[str, Any]:
        """A trial as JSON."""
        key = self.key(trial) if trial.product is not None else ""
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
        return math.exp(-center(log_ratios(self.rounds, key, self.key(self.anchor))))


def _came_to(trial: Trial) -> dict[str, Any]:
    """The build settings that a product came to, those which its profile leaves to the build among them."""
    told = trial.product.artifact.settings if trial.product else {}
    kept = {"keep_fp32": len(told["kept_fp32"] or ())} if "kept_fp32" in told else {}
    return {**told, **kept}
